"""DiG-XL/2 on ImageNet 512px latents (arXiv 2405.18428, table 6): 400K steps of 256, lr 1e-4, EMA 0.9999."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'dig_xl_512'
    config.data.image_size = 512
    config.train.remat = 'dots'
    return system(config, 'dig', 'xl')
