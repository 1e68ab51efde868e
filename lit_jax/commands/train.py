"""Trains a model by a recipe.

    python train.py --config=configs/digits_dit.py --workdir=runs/digits_dit
    python train.py --config=configs/lit_xl.py --dry_run
    python train.py --config=configs/lit_xl.py --config.train.batch_size=64 --workdir=runs/lit_xl

With the same --workdir, training resumes exactly from the newest checkpoint. With several hosts, run the same
command on each of them (docs/run/clusters.md).
"""
import json
from dataclasses import dataclass

from lit_jax.commands.recipe_flags import parse_recipe
from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError, as_typed
from lit_jax.runtime.options import Processes, option
from lit_jax.runtime.paths import check_folder, prepare_file, write_text_atomic


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Processes):
    """Flags beside the recipe."""
    workdir: str | None = option('folder of checkpoints, metrics, samples and report (default: runs/NAME of '
                                 'the recipe)', default=None)
    dry_run: bool = option('print what the recipe is, its cost and what is missing, then stop; status 1 if '
                           'it cannot run', default=False)
    verbose: bool = option('with --dry_run: all fields, the parameters and their sharding', default=False)
    plan: str | None = option('compile for a slice such as v5e:16x16 or cpu:8, print memory, communication '
                              'and forecast, then stop', default=None, metavar='SLICE')
    plan_json: str | None = option('with --plan: also write it, as JSON, into this file', default=None,
                                   metavar='FILE')
    profile: str | None = option('trace these steps for xprof, such as 20-25, into WORKDIR/profile',
                                 default=None, metavar='FROM-TO')

    def __post_init__(self):
        if self.plan_json is not None and self.plan is None:
            raise UserError('--plan_json: only with --plan')


def main() -> int:
    config, options = parse_recipe(TrainOptions, __doc__)
    workdir = options.workdir or f'runs/{config.name}'
    if options.plan is None and not options.dry_run:
        check_folder(workdir, f'--workdir={workdir}')
    # jax is imported after the flags are read, so that wrong ones are reported at once.
    from lit_jax.plan import dry_run, plan
    from lit_jax.training import loop, profile
    if options.dry_run:
        text, ready = dry_run.describe_recipe(config, verbose=options.verbose)
        print(as_typed(text))
        return 0 if ready else 1
    if options.plan is not None:
        if options.plan_json:
            prepare_file(options.plan_json)
        plans = list(plan.make_plans(config, options.plan))
        print(plan.format_plans(plans))
        if options.plan_json:
            found = json.dumps([plan.plan_json(one) for one in plans], indent=1)
            write_text_atomic(options.plan_json, found + '\n')
        return 0
    window = profile.parse_window(options.profile) if options.profile else None
    cli.join(options, saves=True)
    return loop.run(config, workdir, profile=window)
