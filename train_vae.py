"""Fits a small VAE: `python train_vae.py --help`, or `lit-jax train-vae --help`
(lit_jax/commands/train_vae.py)."""
from lit_jax.runtime import signals

if __name__ == '__main__':
    signals.catch()      # before the slower imports
    from lit_jax.commands import train_vae
    from lit_jax.runtime import cli
    cli.run(train_vae.main)
