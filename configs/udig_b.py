"""U-DiG-B/1 (arXiv 2405.18428; what it leaves open: lit_jax/models/udig.py) on ImageNet 256px latents: 400K
steps of 256."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'udig_b'
    return system(config, 'udig', 'b')
