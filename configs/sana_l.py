"""Sana-L/2, class-conditional (arXiv 2410.10629; size as in arXiv 2601.13683), on ImageNet 256px latents:
400K steps of 256."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'sana_l'
    return system(config, 'sana', 'l')
