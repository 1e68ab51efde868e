"""DyDi-LiT table 2: the large systems on Sub-ImageNet at 512px, guidance 1 and 4.0. Settings of table 1."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall%'
TABLE = {
    'dit_l': (('dit', 'dydi_l'), 106.42, '88.17 6.37 0.0723 0.0023 19.47 26.58 54.90',
              '22.71 6.32 0.0029 0.0010 54.00 63.93 24.02'),
    'dig_l': (('dig', 'dydi_l'), 94.15, '134.79 13.13 0.1241 0.0047 12.84 18.20 44.80',
              '34.29 6.81 0.0067 0.0010 45.31 48.20 25.77'),
    'pixart_l': (('dit_kv', 'l'), 97.38, '122.84 9.96 0.1065 0.0044 13.01 20.75 38.07',
                 '45.54 7.64 0.0128 0.0013 35.50 40.78 28.78'),
    'edit_l': (('edit', 'l'), 96.17, '144.85 18.56 0.1082 0.0102 9.24 18.38 26.39',
               '29.90 5.95 0.0041 0.0008 49.07 45.91 24.24'),
    'sana_l': (('sana', 'l'), 98.46, '82.30 5.73 0.0658 0.0018 21.47 28.52 56.08',
               '21.86 6.40 0.0030 0.0011 58.09 69.43 22.12'),
    'dydi_lit_l': (('dydi_lit', 'l'), 98.55, '71.79 5.10 0.0542 0.0014 23.73 31.52 59.89',
                   '21.30 5.77 0.0039 0.0007 59.77 71.42 20.32'),
}
SIZE = {'data.image_size': 512}
ROWS = {f'{name}_cfg_{scale:g}': Row(size, set=SIZE | ({'train.dtype': 'float32'} if system == 'dig' else {}),
                                     system=system,
                                     cfg_scale=scale, published=printed(COLUMNS, line, gflops=gflops),
                                     sub_imagenet=True)
        for name, ((system, size), gflops, *lines) in TABLE.items()
        for scale, line in zip((1.0, 4.0), lines, strict=True)}
get_config = reader(__file__, ROWS)
