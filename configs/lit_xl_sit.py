"""LiT-XL/2 on ImageNet 256px latents, from and taught by SiT-XL/2, a flow: 1.4M steps."""
from lit_jax import recipes


def get_config():
    config = recipes.flow(recipes.default())
    config.name = 'lit_xl_sit'
    recipes.size(config, 'xl', 'linear')
    config.inherit.path = recipes.models_folder('sit_xl')
    config.teacher.path = recipes.models_folder('sit_xl')
    config.train.steps = 1_400_000
    return config
