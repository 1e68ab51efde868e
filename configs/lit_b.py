"""LiT-B/2, ImageNet 256px (arXiv 2501.12976, table 5): from DiT-B/2, taught by DiT-XL/2, 400K steps."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_b'
    recipes.size(config, 'b', 'linear')
    config.inherit.path = recipes.models_folder('dit_b')
    config.teacher.path = recipes.models_folder('dit_xl')
    return config
