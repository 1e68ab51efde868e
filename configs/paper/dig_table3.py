"""DiG table 3: the spatial reorient & enhancement module (SREM), DiG-S/2, ImageNet 256px, 400K steps.

`causal` reads the tokens in one order in every block, `bidirectional` turns them round from block to block;
the convolution starts as the identity or, in `uniform`, as convolutions usually do. The last two rows of the
table put the module before the attention (62.34) and between attention and FFN (62.93) and have no recipe
here. Table 1 compares the times of scans within a block (--config.model.mixer.directions=bidirectional or
four), table 2 sizes."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'gflops fid'
FLOAT32 = {'train.dtype': 'float32'}
TABLE = {
    'causal': ('causal', 'none', '4.29 175.84'),
    'bidirectional': ('bidirectional', 'none', '4.29 69.28'),
    'bidirectional_uniform': ('bidirectional', 'uniform', '4.30 96.83'),
    'bidirectional_identity': ('bidirectional', 'identity', '4.30 63.84'),
    'four_directions': ('official', 'identity', '4.30 62.06'),
}
ROWS = {'dit_s': Row('s', published=printed(COLUMNS, '6.06 68.4'), system='dit')}
ROWS |= {name: Row('s', set=FLOAT32 | {'model.order': order, 'model.local': local},
                   published=printed(COLUMNS, line), system='dig')
         for name, (order, local, line) in TABLE.items()}
get_config = reader(__file__, ROWS)
