"""DyDi-LiT table 3: the small systems on ImageNet at 256px, 400K steps of 256; 50,000 samples in 250 steps.

The starred rows of the table are the authors' own runs. MoH-DiT-S is quoted from the MoH paper; which of its
two variants that is is not said, 90 % of the heads is the reading taken here. LiT-S is LiT's ablation from
scratch with three heads (its table 2), not the inherited and distilled one. The row of DiT-S without a star
(68.40) is LiT's table 5."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid is precision recall'
# (system, size): {cfg: line}
TABLE = {
    'dit_s': (('dit', 's'), {1.0: '68.18 12.06 17.84 0.36 0.54', 1.5: '45.45 9.06 25.39 0.47 0.54',
                             4.0: '16.60 9.86 46.11 0.76 0.29'}),
    'moh_dit_s': (('moh_dit', 's'), {1.0: '67.25 12.15 20.52 0.37 0.58'}),
    'dig_s': (('dig', 's'), {1.0: '62.06 11.77 22.81 0.39 0.56'}),
    'lit_s': (('lit', 's'), {1.0: '63.21 - 22.08 0.39 0.58'}),
    'sana_s': (('sana', 's'), {1.0: '64.15 12.83 19.20 0.38 0.53', 1.5: '41.01 9.76 27.69 0.50 0.52',
                               4.0: '15.19 9.66 48.15 0.80 0.26'}),
    'dydi_lit_s': (('dydi_lit', 's'), {1.0: '58.52 11.77 20.78 0.40 0.58', 1.5: '35.30 8.96 30.42 0.53 0.54',
                                       4.0: '13.36 9.68 52.00 0.84 0.24'}),
}
FIELDS = {'lit': {'model.mixer.heads': 3}, 'dig': {'train.dtype': 'float32'}}
BALANCED = {'eval.labels': 'balanced'}      # 50 samples of each class
ROWS = {f'{name}_cfg_{scale:g}': Row(size, set=BALANCED | FIELDS.get(system, {}), system=system,
                                     cfg_scale=scale, published=printed(COLUMNS, line))
        for name, ((system, size), lines) in TABLE.items() for scale, line in lines.items()}
get_config = reader(__file__, ROWS)
