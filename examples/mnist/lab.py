"""Runs the students of examples/mnist/arms.py with several seeds and writes what came out.

    python -m examples.mnist.lab                                    all arms, three seeds (`make lab`)
    python -m examples.mnist.lab --arms=align_5,lit_5 --seeds=1
    python -m examples.mnist.lab --arms=none                        writes again what is there

The same command goes on where it was stopped: each run is a workdir, and finished ones are not repeated. One
core for each worker. The arms teacher_20 and teacher_50 need the checkpoints of a teacher's training
(`python train.py --config=configs/mnist_dit.py --workdir=runs/mnist_dit`, --teacher_run=runs/mnist_dit);
without it they are left out. Results: WORKDIR/results.json, for --out also tables and plots.
"""
import functools
import json
import platform
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from examples.mnist.arms import ARMS, DRAW_STEPS, DRAWN, TEACHERS, WITH_FEW, Run
from examples.words import PACKAGES
from lit_jax import UserError
from lit_jax.runtime import cli
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.options import option, parse_options
from lit_jax.runtime.paths import write_text_atomic
from lit_jax.runtime.shipped import find_asset

TEACHER, FLOW_TEACHER = find_asset('mnist_dit.safetensors'), find_asset('mnist_flow.safetensors')
RESULT, SHOWN = 'result.json', 'samples.npy'
RECORDED = Path(__file__).with_name('recorded.json')
FEW = 10, 5         # evaluations of the models WITH_FEW, beside the sampler's 25


def run(workdir: Path, arms: Sequence[str], seeds: int, *, workers: int = 0, teacher: Path = TEACHER,
        teacher_run: Path | None = None, out: Path | None = None) -> int:
    """Trains and measures what is missing, all arms of one seed before the next; returns 0."""
    from examples import pool, ruler
    workdir.mkdir(parents=True, exist_ok=True)
    pool.keep_compiled_programs(workdir)
    prepare_teachers(workdir, teacher, teacher_run, {ARMS[name].teacher for name in arms})
    if any(ARMS[name].drawn for name in arms):
        draw_images(workdir)
    there = [name for name in arms if (workdir / ARMS[name].teacher).exists()]
    if left_out := [name for name in arms if name not in there]:
        print(f'{", ".join(left_out)}: left out, they need --teacher_run')
    todo = [one for seed in range(seeds) for name in there
            if not ((one := Run(workdir, name, seed)).path / RESULT).exists()]
    models = {name: workdir / name for name in ('teacher', *TEACHERS) if (workdir / name).exists()
              and not (workdir / name / RESULT).exists()}
    print(f'{len(todo)} runs to do, of {len(there) * seeds}', flush=True)

    def tell(measured: dict) -> str:
        collect(workdir)      # after each run, so that nothing is lost
        return ruler.tell(measured)

    if todo or models:
        pool.run_all(workdir, todo, functools.partial(measure, workdir, few=True), tell, models, most=workers)
    results = collect(workdir)
    if out is not None:
        from examples.mnist.lab_pages import write_docs
        write_text_atomic(RECORDED, json.dumps(results, indent=1) + '\n')
        write_docs(out, results)
    return 0


def prepare_teachers(workdir: Path, teacher: Path, teacher_run: Path | None,
                     wanted: Collection[str]) -> None:
    """Model folders `teacher`, if it is wanted `teacher_flow`, and, of the teacher's run, `teacher_20` and
    `teacher_50`: about so many per cent."""
    from lit_jax.checkpoint.load import find_steps, load_weights
    from lit_jax.checkpoint.model_folder import save_model_folder
    from lit_jax.convert.torch_import import convert
    from lit_jax.recipes.recipe import load_recipe
    for name, file in {'teacher': teacher, 'teacher_flow': FLOW_TEACHER}.items():
        if name in {'teacher', *wanted} and not (workdir / name).exists():
            convert(file, workdir / name)
    if teacher_run is None:
        return
    known = find_steps(teacher_run)
    for name in {arm.teacher for arm in ARMS.values()} - {'teacher', *TEACHERS}:
        wanted = int(name.removeprefix('teacher_')) * load_recipe('mnist_dit').train.steps // 100
        step = min(known, key=lambda step: abs(step - wanted))
        if not (workdir / name).exists():
            save_model_folder(workdir / name, *load_weights(teacher_run, step=step))


def draw_images(workdir: Path) -> None:
    """The data set `drawn` of the teacher, without guidance; one that is there stays as it is."""
    from lit_jax.latents.prepare import prepare_latents
    from lit_jax.latents.prepare_options import PrepareOptions
    if not (workdir / 'drawn').exists():
        print(prepare_latents(PrepareOptions(teacher=workdir / 'teacher', count=DRAWN, steps=DRAW_STEPS,
                                             cfg_scale=1.0, out=workdir / 'drawn')))


def measure(workdir: Path, path: Path, few: bool = False) -> dict:
    """The figures of the model in `path`, which are kept there too, with how it was made. few: of WITH_FEW,
    seed 0, also with fewer evaluations."""
    from examples.mnist.arms import cost
    from examples.ruler import MNIST, Ruler
    from lit_jax.recipes.recipe import load_recipe
    from lit_jax.training.metrics_log import read_lines
    ruler = Ruler('mnist', workdir, MNIST)
    measured, facts = ruler.measure(path, path / SHOWN), {'arm': path.name}
    arm, _, seed = path.name.rpartition('_')
    if arm in ARMS:
        one = Run(workdir, arm, int(seed))
        recipe, lines = one.recipe(), read_lines(path / 'metrics.jsonl')
        facts = {'arm': arm, 'seed': int(seed), 'cost': cost(one), 'align_steps': recipe.align.steps,
                 'steps': recipe.train.steps, 'command': one.command(),
                 'seconds': round(lines[-1].get('time/productive_s', 0)) if lines else 0}
    else:
        facts['steps'] = load_recipe(TEACHERS.get(path.name, 'mnist_dit')).train.steps
    if few and facts['arm'] in WITH_FEW and not facts.get('seed'):
        facts['few'] = {str(steps): distance for steps, distance in ruler.few(path, FEW).items()}
    facts |= {'date': time.strftime('%Y-%m-%d'), 'versions': versions()}
    write_text_atomic(path / RESULT, json.dumps(facts | measured, indent=1) + '\n')
    return measured


def versions() -> dict[str, str]:
    return {'python': platform.python_version(), **{name: version(name) for name in PACKAGES}}


def collect(workdir: Path) -> dict:
    """Writes and returns results.json: {'teacher': figures, 'runs': [those of each finished run]}."""
    read = {path.parent.name: read_json(path) for path in sorted(workdir.glob(f'*/{RESULT}'))}
    order = list(ARMS)
    runs = sorted((one for one in read.values() if one['arm'] in ARMS),
                  key=lambda one: (order.index(one['arm']), one['seed']))
    results = {'command': 'python -m examples.mnist.lab', 'teacher': read.get('teacher', {}),
               **{name: read[name] for name in TEACHERS if name in read}, 'runs': runs}
    write_text_atomic(workdir / 'results.json', json.dumps(results, indent=1) + '\n')
    return results


@dataclass(frozen=True)
class LabOptions:
    workdir: Path = option('output folder', default=Path('runs/mnist_lab'))
    arms: tuple[str, ...] = option('arms to run, or none', default=tuple(ARMS), metavar='NAMES')
    seeds: int = option('runs of each arm', default=3)
    workers: int = option('processes; 0: one for each core', default=0)
    teacher: Path = option('checkpoint of the teacher', default=TEACHER)
    teacher_run: Path | None = option("workdir of the teacher's training, for its checkpoints", default=None)
    out: Path | None = option('folder for the page of the docs and its plots', default=None)


def main() -> int:
    args = parse_options(LabOptions, prog='python -m examples.mnist.lab', description=__doc__)
    arms = () if args.arms == ('none',) else args.arms
    if unknown := [name for name in arms if name not in ARMS]:
        raise UserError(f'unknown --arms: {", ".join(unknown)}; known: {", ".join(ARMS)}')
    if args.seeds < 1 or args.workers < 0:
        raise UserError('--seeds must be at least 1 and --workers at least 0')
    return run(args.workdir, arms, args.seeds, workers=args.workers, teacher=args.teacher,
               teacher_run=args.teacher_run, out=args.out)


if __name__ == '__main__':
    cli.run(main)
