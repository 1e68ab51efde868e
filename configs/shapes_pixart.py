"""The teacher of the rendered shapes: a small PixArt on 20x20 pixels with captions. Half an hour on two quiet cores.

    python -m lit_jax.demo.shapes_encoder --out models/shapes_t5
    python train.py --config=configs/shapes_pixart.py --workdir=runs/shapes_pixart
"""
from lit_jax import config as recipes


def get_config():
    config = recipes.default()
    config.name = 'shapes_pixart'
    recipes.shapes(config)
    config.train.steps = 12_000
    config.train.warmup_steps = 200
    config.checkpoint.every = 1_000
    return config
