"""DiT checkpoint -> convert -> inherit -> distil -> sample -> judge, on real handwritten digits, on a CPU.

    python -m lit_jax.demo                         starts from the teacher in assets/
    python -m lit_jax.demo --train_teacher         trains that teacher first
    python -m lit_jax.demo --seeds 1               one student of each kind instead of three

Starting it again goes on where it stopped. The result is report.html in the workdir.
"""
import argparse
from pathlib import Path

from lit_jax import cli


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m lit_jax.demo', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, default=Path('demo'), help='where everything goes')
    parser.add_argument('--seeds', type=int, default=3, help='students of each kind')
    parser.add_argument('--train_teacher', action='store_true', help='train the teacher instead of taking the shipped one')
    args = parser.parse_args()
    from lit_jax.demo import road
    return road.travel(args.workdir, seeds=args.seeds, train_teacher=args.train_teacher)


if __name__ == '__main__':
    cli.run(main)
