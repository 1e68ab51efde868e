"""LiT attention in LightningDiT-XL/1, from and taught by it, on latents of VA-VAE: 80K steps of 1024.

The linear attention turns queries and keys by their positions, as its teacher's does;
--config.model.mixer.rope=False leaves that out (docs/train/flows.md says why it is kept)."""
from lit_jax import recipes


def get_config():
    config = recipes.lightningdit(recipes.default(), 'linear')
    config.name = 'lit_xl_lightning'
    config.inherit.path = recipes.models_folder('lightningdit_xl')
    config.teacher.path = recipes.models_folder('lightningdit_xl')
    return config
