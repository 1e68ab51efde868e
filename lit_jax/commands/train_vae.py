"""Fits a small VAE to a folder of images, and writes a VAE folder.

    python train_vae.py --config=configs/vae_tiny.py --config.data.path=images --out=models/vae_tiny
"""
import sys

from absl import flags

from lit_jax.recipes.find import find_recipe
from lit_jax.runtime import cli


def define_flags() -> None:
    flags.DEFINE_string('out', None, 'VAE folder to write.')


def main() -> None:
    config = cli.parse_recipe(sys.argv, define_flags, find_recipe)
    from lit_jax.runtime.errors import UserError
    from lit_jax.training.vae_training import train_vae
    if not flags.FLAGS.out:
        raise UserError('give --out=DIR, the VAE folder to write')
    train_vae(config, flags.FLAGS.out)
