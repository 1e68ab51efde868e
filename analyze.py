"""Looks inside a model: `python analyze.py --help`, or `lit-jax analyze --help`
(lit_jax/commands/analyze.py)."""
from lit_jax.commands import analyze
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(analyze.main)
