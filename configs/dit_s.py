"""DiT-S/2 on ImageNet 256px latents (arXiv 2212.09748): 400K steps of 256, lr 1e-4, EMA 0.9999."""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'dit_s'
    return recipes.size(config, 's', 'softmax')
