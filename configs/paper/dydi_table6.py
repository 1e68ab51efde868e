"""DyDi-LiT table 6: initial differential factors, small models on Sub-ImageNet at 256px, guidance 4.0.

`increasing`: from 0.2 in the first block to 0.8 in the last; equal steps are the reading taken here, so every
block is a run of its own. Both have a plain convolution, as in table 5."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall%'
BLOCKS = 9
INCREASING = tuple({'depth': 1, 'mixer': {'factor_init': round(0.2 + 0.6 * block / (BLOCKS - 1), 3)}}
                   for block in range(BLOCKS))
TABLE = {
    'increasing': ({'model.stages': INCREASING}, '29.30 6.73 0.0050 0.0011 48.23 55.86 22.84'),
    'constant_0.01': ({}, '26.20 6.14 0.0039 0.0009 52.21 57.73 23.91'),
}
ROWS = {name: Row('s', set={'model.mixer.dwc': 'single', **fields}, published=printed(COLUMNS, line),
                  cfg_scale=4.0, system='dydi_lit', sub_imagenet=True)
        for name, (fields, line) in TABLE.items()}
get_config = reader(__file__, ROWS)
