"""LiT-L/2, ImageNet 256px (arXiv 2501.12976, table 5): from DiT-L/2, taught by DiT-XL/2, 400K steps."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_l'
    recipes.size(config, 'l', 'linear')
    config.inherit.path = recipes.models_folder('dit_l')
    config.teacher.path = recipes.models_folder('dit_xl')
    return config
