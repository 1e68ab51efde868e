"""A small VAE for 64px images of one's own: 16x16 latents of four channels. See docs/train/photos.md.

    python -m lit_jax.data.toys.photos --out images
    python train_vae.py --config=configs/vae_tiny.py --config.data.path=images --out=models/vae_tiny
"""
from lit_jax.training import vae_training


def get_config():
    config = vae_training.default()
    config.name = 'vae_tiny'
    return config
