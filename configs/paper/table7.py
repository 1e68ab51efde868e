"""LiT table 7: ImageNet 512px, LiT-XL/2 (700K steps of 128, λ1 = 1.0), DiT-XL/2 and SiT-XL/2 (3M of 256).

The steps of SiT are taken to be DiT's: the table does not say."""
from lit_jax.recipes.paper import Row, inherits, reader, scores

LIT = {1.0: scores(14.00, 92.84, .76, .62), 1.5: scores(3.69, 207.97, .85, .53)}
DIT = {1.0: scores(12.03, 105.25, .75, .64), 1.25: scores(4.64, 174.77, .81, .57),
       1.5: scores(3.04, 240.82, .84, .54)}
SIZE = {'data.image_size': 512, 'train.remat': 'dots'}
LIT_FIELDS = SIZE | inherits('dit_xl_512', teacher='dit_xl_512', noise=1.0, variance=0.05,
                             **{'train.steps': 700_000, 'train.batch_size': 128})
ROWS = {f'lit_xl_512_cfg_{scale:g}': Row('xl', set=LIT_FIELDS, published=published, cfg_scale=scale)
        for scale, published in LIT.items()}
ROWS |= {f'dit_xl_512_cfg_{scale:g}': Row('xl', 'softmax', SIZE | {'train.steps': 3_000_000}, published,
                                          scale)
         for scale, published in DIT.items()}
ROWS['sit_xl_512_cfg_1.5'] = Row('xl', 'softmax', SIZE | {'train.steps': 3_000_000},
                                 scores(2.62, 252.21, .84, .57), 1.5, flow=True)
get_config = reader(__file__, ROWS)
