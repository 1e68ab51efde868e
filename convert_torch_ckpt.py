"""Converts checkpoints: `python convert_torch_ckpt.py --help`, or `lit-jax convert --help`
(lit_jax/commands/convert.py)."""
from lit_jax.commands import convert
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(convert.main)
