"""DyDi-LiT table 5: differences of tokens or of maps, small models on Sub-ImageNet at 256px, guidance 4.0.

The row of tokens is that of the token differential operator in table 4 (same figures), so both have a plain
convolution."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall% gflops'
TABLE = {'maps': '26.62 6.75 0.0037 0.0010 51.22 59.55 21.36 6.45',
         'tokens': '26.20 6.14 0.0039 0.0009 52.21 57.73 23.91 5.98'}
ROWS = {name: Row('s', set={'model.mixer.difference': name, 'model.mixer.dwc': 'single'},
                  published=printed(COLUMNS, line), cfg_scale=4.0, system='dydi_lit', sub_imagenet=True)
        for name, line in TABLE.items()}
get_config = reader(__file__, ROWS)
