"""SiT-L/2 on ImageNet 256px latents (arXiv 2401.08740): 400K steps of 256, lr 1e-4, EMA 0.9999."""
from lit_jax import recipes


def get_config():
    config = recipes.flow(recipes.default())
    config.name = 'sit_l'
    return recipes.size(config, 'l', 'softmax')
