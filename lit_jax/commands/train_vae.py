"""Trains a small VAE on a folder of images, and writes a VAE folder.

    python train_vae.py --config=configs/vae_tiny.py --config.data.path=images --out=models/vae_tiny

A run that is stopped saves what there is; the same command goes on from there.
"""
from dataclasses import dataclass

from lit_jax.commands.recipe_flags import parse_recipe
from lit_jax.runtime import signals
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import option


@dataclass(frozen=True)
class VaeOptions:
    out: str = option('VAE folder to write; required', default='')


def main() -> int:
    config, options = parse_recipe(VaeOptions, __doc__, section='vae')
    if not options.out:
        raise UserError('give the VAE folder to write: --out=FOLDER, such as --out=models/vae_mine')
    from lit_jax.training.vae_training import train_vae
    return 0 if train_vae(config, options.out) else signals.PREEMPTED
