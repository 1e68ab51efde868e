"""LiT table 6: ImageNet 256px, LiT-XL/2 (1.4M steps), DiT-XL/2 and SiT-XL/2 (7M), by guidance.

The other systems of the table (GANs, ADM, LDM, MaskGIT, DiM, DiffuSSM ...) are not part of this project.
"""
from lit_jax.recipes.paper import Row, inherits, reader, scores

LIT = {1.0: scores(10.24, 114.79, .666, .674), 1.25: scores(3.60, 191.06, .758, .623),
       1.5: scores(2.32, 265.20, .824, .574)}
DIT = {1.0: scores(9.62, 121.50, .67, .67), 1.25: scores(3.22, 201.77, .76, .62),
       1.5: scores(2.27, 278.24, .83, .57)}
LIT_FIELDS = inherits('dit_xl', teacher='dit_xl', noise=0.5, variance=0.05, **{'train.steps': 1_400_000})
ROWS = {f'lit_xl_cfg_{scale:g}': Row('xl', set=LIT_FIELDS, published=published, cfg_scale=scale)
        for scale, published in LIT.items()}
ROWS |= {f'dit_xl_cfg_{scale:g}': Row('xl', 'softmax', {'train.steps': 7_000_000}, published, scale)
         for scale, published in DIT.items()}
ROWS['sit_xl_cfg_1.5'] = Row('xl', 'softmax', {'train.steps': 7_000_000}, scores(2.06, 277.50, .83, .59), 1.5,
                             flow=True)
get_config = reader(__file__, ROWS)
