"""LiT table 2: how many heads linear attention needs. ReLU with the convolution, from scratch, 400K steps."""
from lit_jax.recipes.paper import Row, reader, scores

PUBLISHED = {
    's': {1: scores(64.42, 21.54, .380, .574), 2: scores(63.24, 22.07, .385, .570),
          3: scores(63.21, 22.08, .386, .583), 6: scores(63.66, 22.16, .383, .580),
          48: scores(78.76, 17.46, .322, .482), 96: scores(116.00, 11.49, .224, .261)},
    'b': {1: scores(41.77, 34.78, .487, .631), 2: scores(41.39, 35.59, .494, .631),
          3: scores(40.86, 35.79, .497, .629),
          12: scores(42.11, 34.60, .484, .631), 96: scores(68.30, 20.45, .375, .531),
          192: scores(112.39, 12.07, .240, .282)},
    'l': {1: scores(24.46, 57.36, .600, .637), 2: scores(24.37, 57.02, .599, .622),
          4: scores(24.04, 59.02, .597, .636), 16: scores(25.25, 54.67, .587, .632)},
    'xl': {1: scores(21.13, 65.06, .619, .632), 2: scores(20.66, 65.39, .624, .636),
           4: scores(20.82, 65.52, .619, .632), 16: scores(21.69, 63.06, .617, .628)},
}
ROWS = {f'{size}_{heads}_heads': Row(size, 'linear', {'model.mixer.heads': heads}, published)
        for size, rows in PUBLISHED.items() for heads, published in rows.items()}
get_config = reader(__file__, ROWS)
