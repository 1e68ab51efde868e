"""Caches latents: `python prepare_latents.py --help`, or `lit-jax prepare-latents --help`
(lit_jax/commands/prepare_latents.py)."""
from lit_jax.commands import prepare_latents
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(prepare_latents.main)
