"""Draws images: `python sample.py --help`, or `lit-jax sample --help` (lit_jax/commands/sample.py)."""
from lit_jax.commands import sample
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(sample.main)
