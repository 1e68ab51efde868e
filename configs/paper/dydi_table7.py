"""DyDi-LiT table 7: the small systems of table 1 on Sub-ImageNet at 256px, guidance 2.0 and 3.0."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall%'
# name: (system, size), GFLOPs, cfg 2.0, cfg 3.0
TABLE = {
    'dit_s': (('dit', 'dydi_s'), 6.06, '65.45 7.59 0.0379 0.0023 25.88 33.41 43.74',
              '43.52 6.68 0.0159 0.0012 36.73 42.29 34.04'),
    'dig_s': (('dig', 'dydi_s'), 5.92, '82.20 9.64 0.0502 0.0035 22.08 28.18 36.57',
              '55.55 7.94 0.0229 0.0019 32.09 37.00 30.99'),
    'pixart_s': (('dit_kv', 's'), 5.78, '76.08 9.55 0.0449 0.0034 22.91 30.36 38.59',
                 '51.63 7.84 0.0204 0.0017 33.34 39.47 32.54'),
    'edit_s': (('edit', 's'), 5.91, '69.59 8.29 0.0384 0.0026 25.71 32.67 35.91',
               '45.27 7.42 0.0157 0.0016 37.49 44.32 27.34'),
    'sana_s': (('sana', 's'), 5.97, '53.54 7.12 0.0279 0.0021 31.68 39.18 42.52',
               '33.30 6.44 0.0093 0.0012 43.98 51.21 33.42'),
    'dydi_lit_s': (('dydi_lit', 's'), 5.98, '44.06 6.54 0.0203 0.0017 35.34 44.58 42.28',
                   '27.45 6.03 0.0059 0.0010 47.53 58.50 31.13'),
}
ROWS = {f'{name}_cfg_{scale:g}': Row(size, set={'train.dtype': 'float32'} if system == 'dig' else {},
                                     system=system,
                                     cfg_scale=scale, published=printed(COLUMNS, line, gflops=gflops),
                                     sub_imagenet=True)
        for name, ((system, size), gflops, *lines) in TABLE.items()
        for scale, line in zip((2.0, 3.0), lines, strict=True)}
get_config = reader(__file__, ROWS)
