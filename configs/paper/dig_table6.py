"""DiG table 6 (supplement): ImageNet at 512px, DiT-XL/2 and DiG-XL/2 after 400K steps of 256."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid is precision recall'
TABLE = {'dit': '20.94 6.78 66.30 0.74 0.58', 'dig': '17.36 6.12 69.42 0.75 0.63'}
SIZE = {'data.image_size': 512, 'train.remat': 'dots'}
ROWS = {f'{system}_xl_400k': Row('xl', set=SIZE | ({'train.dtype': 'float32'} if system == 'dig' else {}),
                                 system=system, published=printed(COLUMNS, line))
        for system, line in TABLE.items()}
get_config = reader(__file__, ROWS)
