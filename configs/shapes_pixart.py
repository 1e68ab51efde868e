"""The teacher of the rendered shapes: a small PixArt on captioned 18x18 images. An hour or more on two cores.

    python -m examples.shapes.encoder --out models/shapes_t5
    python train.py --config=configs/shapes_pixart.py --workdir=runs/shapes_pixart_first
    python train.py --config=configs/shapes_pixart.py:refine --workdir=runs/shapes_pixart

The first run learns to draw, at a rate at which cross-attention does not learn for long: its keys grow and
captions are forgotten. The second continues from its averaged weights more slowly, and learns what captions
say."""
from lit_jax import recipes
from lit_jax.runtime.errors import check_known


def get_config(stage='first'):
    check_known('row of configs/shapes_pixart.py', stage, ('first', 'refine'))
    config = recipes.default()
    recipes.shapes(config)
    config.checkpoint.every = 500
    config.train.warmup_steps = 200
    if stage == 'first':
        config.name = 'shapes_pixart_first'
        config.train.steps = 4_000
        config.train.learning_rate = 2e-3
        config.train.clip_norm = 0.0
        return config
    config.name = 'shapes_pixart'
    config.train.steps = 14_500
    config.train.cooldown_steps = 3_000
    config.inherit.path = 'runs/shapes_pixart_first'
    config.inherit.copy = 'all'
    return config
