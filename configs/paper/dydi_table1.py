"""DyDi-LiT table 1: every system on Sub-ImageNet at 256px, without guidance and with 4.0.

100,600 steps of 256, 30,000 samples in 200 steps, 300 of each class; precision and recall as fractions. The
paper's 100 classes are not published, so its figures can be compared in trend only. PixArt-Σ is DiT with
compressed keys; DiG was trained in float32, as mixed precision was unstable for the authors."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid kid skid is precision% recall%'
FLOAT32 = {'train.dtype': 'float32'}
# name: (system, size), GFLOPs, cfg 1.0, cfg 4.0
TABLE = {
    'dit_s': (('dit', 'dydi_s'), 6.06, '111.85 11.81 0.0931 0.0053 13.77 20.50 43.54',
              '35.29 7.15 0.0080 0.0010 43.28 47.05 28.23'),
    'dig_s': (('dig', 'dydi_s'), 5.92, '129.04 14.61 0.1071 0.0075 11.79 19.68 34.17',
              '44.83 7.68 0.0129 0.0014 37.73 42.90 25.01'),
    'pixart_s': (('dit_kv', 's'), 5.78, '121.15 14.62 0.0991 0.0072 12.30 18.50 35.90',
                 '40.74 7.70 0.0103 0.0012 40.35 42.44 27.82'),
    'edit_s': (('edit', 's'), 5.91, '118.46 12.20 0.0935 0.0055 13.14 18.63 35.37',
               '37.40 8.15 0.0083 0.0016 43.34 46.92 21.05'),
    'sana_s': (('sana', 's'), 5.97, '103.74 10.69 0.0833 0.0046 15.81 22.40 45.13',
               '28.00 6.95 0.0044 0.0011 49.37 55.01 22.61'),
    'dydi_lit_s': (('dydi_lit', 's'), 5.98, '94.08 9.95 0.0727 0.0043 17.42 24.69 50.75',
                   '24.48 6.49 0.0033 0.0009 53.82 63.26 20.93'),
    'dit_b': (('dit', 'dydi_b'), 10.50, '96.66 9.50 0.0798 0.0040 16.61 24.69 52.37',
              '25.28 6.70 0.0038 0.0009 51.06 57.74 24.07'),
    'dig_b': (('dig', 'dydi_b'), 10.43, '122.74 12.49 0.0995 0.0060 12.49 20.17 34.18',
              '43.33 8.02 0.0112 0.0015 38.67 40.87 22.68'),
    'pixart_b': (('dit_kv', 'b'), 10.13, '107.98 12.10 0.0880 0.0056 14.48 21.71 42.33',
                 '30.96 7.10 0.0057 0.0011 47.35 53.23 24.48'),
    'edit_b': (('edit', 'b'), 10.45, '103.48 9.80 0.0806 0.0039 15.82 21.70 44.44',
               '29.04 7.66 0.0046 0.0014 50.59 56.02 20.95'),
    'sana_b': (('sana', 'b'), 10.38, '88.65 8.80 0.0696 0.0035 18.77 27.05 49.69',
               '22.33 6.55 0.0031 0.0010 56.76 65.08 21.42'),
    'dydi_lit_b': (('dydi_lit', 'b'), 10.39, '79.84 8.25 0.0602 0.0033 20.93 30.15 53.17',
                   '21.09 6.29 0.0036 0.0009 59.94 72.26 19.77'),
    'dit_l': (('dit', 'dydi_l'), 23.01, '77.32 7.49 0.0613 0.0027 21.45 30.92 55.74',
              '21.40 6.85 0.0033 0.0008 57.46 65.36 22.95'),
    'dig_l': (('dig', 'dydi_l'), 23.58, '102.90 10.93 0.0808 0.0050 15.95 23.63 44.79',
              '25.23 6.70 0.0032 0.0009 54.90 62.46 19.25'),
    'pixart_l': (('dit_kv', 'l'), 22.45, '87.43 8.68 0.0692 0.0034 18.65 27.71 51.64',
                 '22.57 7.16 0.0031 0.0011 55.46 64.86 22.27'),
    'edit_l': (('edit', 'l'), 23.39, '87.08 7.76 0.0666 0.0026 19.57 26.76 50.85',
               '23.61 7.74 0.0039 0.0014 58.02 67.44 18.28'),
    'sana_l': (('sana', 'l'), 22.83, '71.26 7.09 0.0538 0.0025 23.60 33.34 54.24',
               '20.57 6.54 0.0045 0.0011 64.04 74.50 20.19'),
    'dydi_lit_l': (('dydi_lit', 'l'), 22.85, '62.63 6.80 0.0446 0.0024 26.28 35.30 55.91',
                   '20.03 6.18 0.0046 0.0008 66.65 75.43 20.41'),
}
ROWS = {f'{name}_cfg_{scale:g}': Row(size, set=FLOAT32 if system == 'dig' else {}, cfg_scale=scale,
                                     system=system,
                                     published=printed(COLUMNS, line, gflops=gflops), sub_imagenet=True)
        for name, ((system, size), gflops, *lines) in TABLE.items()
        for scale, line in zip((1.0, 4.0), lines, strict=True)}
get_config = reader(__file__, ROWS)
