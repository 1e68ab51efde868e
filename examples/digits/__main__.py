"""DiT checkpoint -> convert -> inherit -> distil -> sample -> judge, on real handwritten digits, on a CPU.

    python -m examples.digits                         starts from the teacher in assets/
    python -m examples.digits --train_teacher         trains that teacher first
    python -m examples.digits --baseline_seeds 3      three students of each kind, as in docs/start/digits.md

The same command resumes an interrupted run. The result is report.html in the workdir.
"""
from dataclasses import dataclass
from pathlib import Path

from lit_jax import UserError
from lit_jax.runtime import cli
from lit_jax.runtime.options import option, parse_options


@dataclass(frozen=True)
class DigitsOptions:
    workdir: Path = option('output folder', default=Path('demo'))
    seeds: int = option('number of distilled students', default=3)
    baseline_seeds: int = option('number of students of each other kind', default=1)
    train_teacher: bool = option('train the teacher instead of using the shipped one', default=False)


def main() -> int:
    args = parse_options(DigitsOptions, prog='python -m examples.digits', description=__doc__)
    if args.seeds < 1 or args.baseline_seeds < 1:
        raise UserError('--seeds and --baseline_seeds must be at least 1')
    from examples.digits import stages
    return stages.run(args.workdir, seeds=args.seeds, baseline_seeds=args.baseline_seeds,
                      train_teacher=args.train_teacher)


if __name__ == '__main__':
    cli.run(main)
