"""LiT-XL/2 on ImageNet 512px latents (arXiv 2501.12976, table 7): batch 128, λ1 = 1.0, 700K steps."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_xl_512'
    recipes.size(config, 'xl', 'linear')
    config.data.image_size = 512
    config.inherit.path = recipes.models_folder('dit_xl_512')
    config.teacher.path = recipes.models_folder('dit_xl_512')
    config.teacher.lambda_noise = 1.0
    config.train.steps = 700_000
    config.train.batch_size = 128
    config.train.remat = 'dots'      # 9.3 GB a chip on 16 of 16 GB; else it does not fit (docs/run/plans.md)
    return config
