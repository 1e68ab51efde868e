"""Scores image sets and models: `python evaluate.py --help`, or `lit-jax evaluate --help`
(lit_jax/commands/evaluate.py)."""
from lit_jax.commands import evaluate
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(evaluate.main)
