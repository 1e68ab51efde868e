"""LiT-S/2, ImageNet 256px (arXiv 2501.12976, table 5): from DiT-S/2, taught by DiT-XL/2, 400K steps."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_s'
    recipes.size(config, 's', 'linear')
    config.inherit.path = recipes.models_folder('dit_s')
    config.teacher.path = recipes.models_folder('dit_xl')
    return config
