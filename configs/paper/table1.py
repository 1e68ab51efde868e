"""LiT table 1 (details: table 11): which linear attention. From scratch, 400K steps, DiT's heads."""
from lit_jax.recipes.paper import Row, reader, scores

HEADS = {'s': 6, 'b': 12}
VARIANTS = {
    'softmax': {},
    'relu': {'dwc_kernel': 0},
    'relu_dwc': {},
    'relu_focused': {'focus_power': 3},
    'gelu_focused': {'focus_power': 3, 'activation': 'gelu'},
}
PUBLISHED = {
    's_softmax': scores(68.40), 's_relu': scores(88.46, 15.11, .29, .45),
    's_relu_dwc': scores(63.66, 22.16, .38, .58),
    's_relu_focused': scores(63.05, 22.49, .39, .58), 's_gelu_focused': scores(70.83, 19.41, .36, .54),
    'b_softmax': scores(43.47), 'b_relu': scores(56.92, 25.80, .42, .59),
    'b_relu_dwc': scores(42.11, 34.60, .48, .63),
    'b_relu_focused': scores(40.58, 35.98, .50, .63), 'b_gelu_focused': scores(58.86, 24.23, .42, .57),
}


def row(size: str, variant: str) -> Row:
    options = {'heads': HEADS[size], **VARIANTS[variant]}
    return Row(size, 'softmax' if variant == 'softmax' else 'linear',
               {f'model.mixer.{name}': value for name, value in options.items()},
               PUBLISHED[f'{size}_{variant}'])


ROWS = {f'{size}_{variant}': row(size, variant) for size in HEADS for variant in VARIANTS}
get_config = reader(__file__, ROWS)
