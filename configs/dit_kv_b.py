"""DiT-B/2 with PixArt-Σ's compressed keys (arXiv 2403.04692; size as in arXiv 2601.13683): ImageNet 256px,
400K steps of 256."""
from lit_jax import recipes
from lit_jax.recipes.systems import system


def get_config():
    config = recipes.default()
    config.name = 'dit_kv_b'
    return system(config, 'dit_kv', 'b')
