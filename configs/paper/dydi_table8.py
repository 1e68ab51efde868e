"""DyDi-LiT table 8: small systems on ImageNet at 256px, guidance 1.25, 2.0 and 3.0. The models of table 3."""
from lit_jax.recipes.paper import Row, printed, reader

COLUMNS = 'fid sfid is precision% recall%'
TABLE = {
    'dit': {1.25: '55.69 10.38 21.34 41.57 54.05', 2.0: '31.22 7.47 32.52 56.52 48.85',
            3.0: '19.13 7.65 41.70 69.17 37.39'},
    'sana': {1.25: '51.41 11.16 23.49 44.05 53.29', 2.0: '27.36 8.12 35.00 60.60 47.24',
             3.0: '16.75 7.89 44.02 74.53 35.34'},
    'dydi_lit': {1.25: '45.54 10.17 25.79 46.80 55.66', 2.0: '21.97 7.40 39.01 64.74 46.98',
                 3.0: '13.56 7.69 48.21 78.34 33.85'},
}
ROWS = {f'{system}_s_cfg_{scale:g}': Row('s', set={'eval.labels': 'balanced'},
                                         published=printed(COLUMNS, line), cfg_scale=scale, system=system)
        for system, lines in TABLE.items() for scale, line in lines.items()}
get_config = reader(__file__, ROWS)
