"""DiT checkpoint -> convert -> inherit -> distil -> sample -> judge, on real handwritten digits, on a CPU.

    python -m examples.digits                         starts from the teacher in assets/
    python -m examples.digits --train_teacher         trains that teacher first
    python -m examples.digits --baseline_seeds 3      three students of every kind, as in docs/start/digits.md

Starting it again goes on where it stopped. The result is report.html in the workdir.
"""
import argparse
from pathlib import Path

from lit_jax import UserError
from lit_jax.runtime import cli


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m examples.digits', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, default=Path('demo'), help='where everything goes')
    parser.add_argument('--seeds', type=int, default=3, help='distilled students')
    parser.add_argument('--baseline_seeds', type=int, default=1, help='students of each other kind')
    parser.add_argument('--train_teacher', action='store_true',
                        help='train the teacher instead of taking the shipped one')
    args = parser.parse_args()
    if args.seeds < 1 or args.baseline_seeds < 1:
        raise UserError('--seeds and --baseline_seeds must be at least 1')
    from examples.digits import road
    return road.travel(args.workdir, seeds=args.seeds, baseline_seeds=args.baseline_seeds,
                       train_teacher=args.train_teacher)


if __name__ == '__main__':
    cli.run(main)
