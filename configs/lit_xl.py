"""LiT-XL/2 on ImageNet 256px latents (arXiv 2501.12976, table 6): from and taught by DiT-XL/2, 1.4M steps."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_xl'
    recipes.size(config, 'xl', 'linear')
    config.inherit.path = recipes.models_folder('dit_xl')
    config.teacher.path = recipes.models_folder('dit_xl')
    config.train.steps = 1_400_000
    return config
