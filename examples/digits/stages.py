"""The stages of the demo, each with the command that does the same."""
import functools
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from examples import pool
from examples.digits import figures, pages
from examples.students import ARMS, Student
from examples.words import print_command, print_next, print_stage, quoted, short
from lit_jax.checkpoint.load import load
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert, describe
from lit_jax.diffusion.settings import recorded
from lit_jax.recipes.recipe import load_recipe
from lit_jax.runtime.paths import file_sha256
from lit_jax.runtime.progress import format_seconds
from lit_jax.runtime.shipped import find_asset
from lit_jax.training import loop

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain', 'scikit-learn')      # in a teacher's card
SHIPPED = find_asset('digits_dit.safetensors')


def run(workdir: Path, *, seeds: int, baseline_seeds: int, train_teacher: bool) -> int:
    """Runs all stages, writes `figures.json` and `report.html` in `workdir`; returns the exit status."""
    began = time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)
    pool.keep_compiled_programs(workdir)

    print_stage(1, 'a judge: a small classifier of real digits')
    real = figures.real_figures(pool.get_judge(workdir))
    print(f'accuracy on held-out digits {real["judge_accuracy"]:.1%}; Fréchet distance of held-out to '
          f'training digits (the floor) {real["floor"]:.2f}')

    print_stage(2, 'the teacher: a DiT, converted from a PyTorch checkpoint')
    checkpoint = train_the_teacher(workdir) if train_teacher else SHIPPED
    print_command(f'python convert_torch_ckpt.py {short(checkpoint)} --out {workdir / "teacher"} --overwrite')
    print(describe(convert(checkpoint, workdir / 'teacher', overwrite=True)))

    students = [student(workdir, arm, seed) for arm in ARMS
                for seed in range(seeds if arm == 'distilled' else baseline_seeds)]
    print_stage(3, f'{len(students)} students, sampled and judged')
    for one in students:
        print_command(one.command())
    measure = functools.partial(figures.measure_folder, workdir, figures.STEPS)
    runs = pool.run_all(workdir, students, measure, figures.tell, {'teacher': workdir / 'teacher'})
    result = {**real, **figures.summarise(load(workdir / 'teacher'), load(students[0].path), runs)}
    result['seconds'] = round(time.perf_counter() - began)
    (workdir / 'figures.json').write_text(json.dumps(result, indent=1))
    if train_teacher:
        write_card(checkpoint, result)

    print_stage(4, 'the report')
    paths = {arm: student(workdir, arm, 0).path for arm in ARMS}
    pages.write_demo_report(workdir, load(workdir / 'teacher', scan_layers=False), paths, result)
    print(pages.figures_as_text(result))
    print(f'\n{format_seconds(time.perf_counter() - began)}. Open {workdir / "report.html"}')
    print_next(next_commands(workdir))
    return 0


def next_commands(workdir: Path) -> list[str]:
    one, teacher = quoted(student(workdir, 'distilled', 0).path), quoted(workdir / 'teacher')
    return [f'python sample.py --grid_compare {teacher} {one} --classes 3,7 --cfg_scale 2 --out digits.png',
            f'python analyze.py --from {one} --teacher {teacher} --out {quoted(workdir / "analysis")}',
            f'python app.py --from={one} --teacher={teacher}      # needs pip install -e ".[demo]"']


def student(workdir: Path, arm: str, seed: int) -> Student:
    """configs/digits_lit.py with this demo's teacher, without sample grids: the report draws its own."""
    return Student(workdir, arm, seed, fields={'sample.every': 0})


def train_the_teacher(workdir: Path) -> Path:
    """Trains configs/digits_dit.py and exports it with DiT's key names; returns the file."""
    out = workdir / 'digits_dit.safetensors'
    print_command(f'python train.py --config=configs/digits_dit.py --workdir={workdir / "digits_dit"}')
    loop.train(load_recipe('digits_dit'), workdir / 'digits_dit')
    print_command(f'python convert_torch_ckpt.py {workdir / "digits_dit"} --to_torch --out {out} --overwrite')
    export(workdir / 'digits_dit', out, overwrite=True)
    return out


def write_card(checkpoint: Path, result: dict) -> None:
    """The recipe and the figures of a teacher, beside its file. Both can be copied to assets/."""
    config, teacher = load_recipe('digits_dit'), result['rows'][0]
    card = {
        'command': 'python train.py --config=configs/digits_dit.py --workdir=runs/digits_dit',
        'export': 'python convert_torch_ckpt.py runs/digits_dit --to_torch --out '
                  'assets/digits_dit.safetensors',
        'seed': config.seed, 'steps': teacher['steps'], 'batch_size': config.train.batch_size,
        'weights': 'ema', 'sampling': recorded(config.sample), 'sha256': file_sha256(checkpoint),
        'bytes': checkpoint.stat().st_size,
        'versions': {'python': platform.python_version(), **{name: version(name) for name in PACKAGES}},
        'figures': {**{name: teacher[name]
                       for name in ('distance', 'accuracy', 'accuracy_unguided', 'parameters')},
                    **{name: result[name] for name in ('floor', 'judge_accuracy', 'samples')}}}
    checkpoint.with_suffix('.json').write_text(json.dumps(card, indent=1) + '\n')
