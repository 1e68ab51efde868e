"""Fits a recipe: `python train.py --help`, or `lit-jax train --help` (lit_jax/commands/train.py)."""
from lit_jax.commands import train
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(train.main)
