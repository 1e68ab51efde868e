"""DiT checkpoint -> convert -> inherit -> align -> distil -> sample -> judge, on MNIST, on a CPU.

    python -m examples.mnist                      starts from the teacher in assets/
    python -m examples.mnist --train_teacher      trains that teacher first (half an hour on one core)

Four students for 5 % of what the teacher's training cost: aligned and distilled, LiT's recipe, a hybrid, and
one from scratch. The same command resumes an interrupted run. The result is report.html in the workdir.
"""
from dataclasses import dataclass
from pathlib import Path

from lit_jax.runtime import cli
from lit_jax.runtime.options import option, parse_options


@dataclass(frozen=True)
class MnistOptions:
    workdir: Path = option('output folder', default=Path('demo'))
    train_teacher: bool = option('train the teacher instead of using the shipped one', default=False)


def main() -> int:
    args = parse_options(MnistOptions, prog='python -m examples.mnist', description=__doc__)
    from examples.mnist import stages
    return stages.run(args.workdir, train_teacher=args.train_teacher)


if __name__ == '__main__':
    cli.run(main)
