"""The teacher of the rendered shapes: a small PixArt on 20x20 pixels with captions. 45 minutes on two quiet cores.

    python -m lit_jax.demo.shapes_encoder --out models/shapes_t5
    python train.py --config=configs/shapes_pixart.py --workdir=runs/shapes_pixart_first
    python train.py --config=configs/shapes_pixart.py:refine --workdir=runs/shapes_pixart

The second run goes on from the averaged weights of the first with a fifth of its learning rate.
"""
from lit_jax import config as recipes

REFINE = 3_348      # steps of the second run


def get_config(stage='first'):
    config = recipes.default()
    recipes.shapes(config)
    config.checkpoint.every = 500
    if stage == 'first':
        config.name = 'shapes_pixart_first'
        config.train.steps = 10_350
        config.train.warmup_steps = 200
        return config
    config.name = 'shapes_pixart'
    config.train.steps = REFINE
    config.train.warmup_steps = 200
    config.train.learning_rate = 3e-4
    config.inherit.path = 'runs/shapes_pixart_first'
    config.inherit.copy = 'all'
    return config
