"""Fits a recipe.

    python train.py --config=configs/digits_dit.py --workdir=runs/digits_dit
    python train.py --config=configs/lit_xl.py --dry_run
    python train.py --config=configs/lit_xl.py --config.train.batch_size=64 --workdir=runs/lit_xl

Starting again with the same --workdir resumes exactly where the newest checkpoint left off.
"""
import sys
from pathlib import Path

from absl import flags

from lit_jax import cli


def define_flags() -> None:
    flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics, samples and the report go.')
    flags.DEFINE_bool('dry_run', False, 'Print the recipe, the parameter table and the cost, then stop.')


def main() -> int:
    config = cli.parse_recipe(sys.argv, define_flags)
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.training import dry_run, loop
    if flags.FLAGS.dry_run:
        print(dry_run.describe_recipe(config))
        return 0
    workdir = Path(flags.FLAGS.workdir or f'runs/{config.name}')
    return loop.run(config, workdir)


if __name__ == '__main__':
    cli.run(main)
