"""Fits a recipe.

    python train.py --config=configs/digits_dit.py --workdir=runs/digits_dit
    python train.py --config=configs/lit_xl.py --dry_run
    python train.py --config=configs/lit_xl.py --config.train.batch_size=64 --workdir=runs/lit_xl

Starting again with the same --workdir resumes exactly where the newest checkpoint left off. On several hosts
the same command runs on each of them (docs/run/clusters.md).
"""
import sys

from absl import flags

from lit_jax.recipes.find import find_recipe
from lit_jax.runtime import cli


def define_flags() -> None:
    flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics, samples and the report go.')
    flags.DEFINE_bool('dry_run', False, 'Print the recipe, the parameter table and the cost, then stop.')
    flags.DEFINE_string('plan', None, 'Compile for a slice such as v5e:16x16 or cpu:8, print what it needs, '
                                      'then stop.')
    flags.DEFINE_string('profile', None, 'Steps to trace for xprof, such as 20-25, into WORKDIR/profile.')
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no scheduler says who the others '
                                             'are.')
    flags.DEFINE_integer('num_processes', None, 'Processes of this run, with --coordinator.')
    flags.DEFINE_integer('process_id', None, 'Number of this process, 0 to num_processes - 1, with '
                                             '--coordinator.')
    flags.DEFINE_integer('heartbeat_seconds', 60, 'Silence after which another process counts as dead.',
                         lower_bound=5)


def main() -> int:
    config = cli.parse_recipe(sys.argv, define_flags, find_recipe)
    options = flags.FLAGS
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.plan import dry_run, plan
    from lit_jax.runtime import cluster
    from lit_jax.training import loop, profile
    if options.dry_run:
        print(dry_run.describe_recipe(config))
        return 0
    if options.plan is not None:
        print(plan.describe_plan(config, options.plan))
        return 0
    window = profile.parse_window(options.profile) if options.profile else None
    cluster.join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_seconds)
    cli.name_process(*cluster.process())
    return loop.run(config, options.workdir or f'runs/{config.name}', profile=window)
