"""EDiT-L/2, class-conditional (arXiv 2503.16726; size as in arXiv 2601.13683), on ImageNet 256px latents:
400K steps of 256."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'edit_l'
    return system(config, 'edit', 'l')
