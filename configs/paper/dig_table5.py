"""DiG table 5: from DiG to U-DiG, on ImageNet at 256px and 512px after 400K steps.

DiT-S/2 at 512px, which the table gives as NaN, has no row. U-DiG's structure is only partly published."""
from lit_jax.recipes.paper import Row, reader

FLOAT32 = {'train.dtype': 'float32'}
# (system, fields): {image size: FID}
TABLE = {
    'dit_s': ('dit', {}, {256: 68.40}),
    'dig_s': ('dig', FLOAT32, {256: 62.06, 512: 99.04}),
    'dig_s_skip': ('dig', FLOAT32 | {'model.skip': 'skip'}, {256: 57.01, 512: 91.42}),
    'udig_s': ('udig', FLOAT32, {256: 52.20, 512: 82.62}),
}
ROWS = {f'{name}_{image_size}': Row('s', set=fields | {'data.image_size': image_size}, published={'fid': fid},
                                    system=system)
        for name, (system, fields, figures) in TABLE.items() for image_size, fid in figures.items()}
get_config = reader(__file__, ROWS)
