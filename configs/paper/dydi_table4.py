"""DyDi-LiT table 4: what each part adds, small models on Sub-ImageNet at 256px, guidance 4.0.

Two things are read into it: the rows before the token differential operator have Sana's normaliser (the
paper's equation 4), those from it on have none (equation 8); and the row of the operator has one plain 3 x 3
convolution of the values, as table 5 gives the same model the GFLOPs of one with a convolution, while the
last row trains it as three branches."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall%'
NONE = {'difference': 'none', 'dwc': 'none', 'normaliser': 'weights'}
# row: options of the mixer (None: Sana itself), line
TABLE = {
    'sana': (None, '28.00 6.95 0.0044 0.0011 49.37 55.01 22.61'),
    'focused_kernel': (NONE | {'projectors': 0, 'powers': 0}, '28.20 6.94 0.0044 0.0011 49.79 55.99 23.59'),
    'dynamic_measure_kernel': (NONE | {'projectors': 0}, '27.87 7.07 0.0043 0.0011 50.08 56.49 23.40'),
    'dynamic_projection': (NONE, '27.46 6.83 0.0043 0.0011 50.65 57.38 22.15'),
    'token_differential': ({'dwc': 'single'}, '26.20 6.14 0.0039 0.0009 52.21 57.73 23.91'),
    'reparameterization': ({}, '24.48 6.49 0.0033 0.0009 53.82 63.26 20.93'),
}
ROWS = {name: Row('s', set={f'model.mixer.{option}': value for option, value in (options or {}).items()},
                  published=printed(COLUMNS, line), cfg_scale=4.0, system='sana' if options is None
                  else 'dydi_lit', sub_imagenet=True)
        for name, (options, line) in TABLE.items()}
get_config = reader(__file__, ROWS)
