"""DiG-B/2 (arXiv 2405.18428) on ImageNet 256px latents: 400K steps of 256, lr 1e-4, EMA 0.9999."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'dig_b'
    return system(config, 'dig', 'b')
