"""Fits a recipe: `python train.py --help`, or `lit-jax train --help` (lit_jax/commands/train.py)."""
from lit_jax.runtime import signals

if __name__ == '__main__':
    signals.catch()      # before the slower imports
    from lit_jax.commands import train
    from lit_jax.runtime import cli
    cli.run(train.main)
