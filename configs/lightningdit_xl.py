"""LightningDiT-XL/1 on ImageNet 256px latents of VA-VAE (arXiv 2501.01423): 64 epochs, 80K steps of 1024.

`evaluate.py --preset=lightningdit_64` draws as for its published figures."""
from lit_jax import recipes


def get_config():
    config = recipes.lightningdit(recipes.default(), 'softmax')
    config.name = 'lightningdit_xl'
    return config
