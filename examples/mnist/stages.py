"""The stages of the demo, each with the command that does the same."""
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path

from examples import pool, ruler
from examples.mnist import lab, pages
from examples.mnist.arms import DEMO, Run
from examples.mnist.blocks import measure_blocks
from examples.words import print_command, print_next, print_stage, quoted, short
from lit_jax.checkpoint.load import load
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert, describe
from lit_jax.models.network import count_parameters
from lit_jax.recipes.recipe import load_recipe
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import file_sha256
from lit_jax.runtime.progress import format_seconds

STAGES = 5


def run(workdir: Path, *, train_teacher: bool) -> int:
    """Runs all stages, writes `figures.json` and `report.html` in `workdir`; returns the exit status."""
    began = time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)
    pool.keep_compiled_programs(workdir)

    print_stage(1, 'the judge: a small classifier of real digits', STAGES)
    real = ruler.Ruler('mnist', workdir, ruler.MNIST).real()
    print(f'accuracy on {real["held_out"]:,} held-out digits {real["judge_accuracy"]:.1%}; Fréchet distance '
          f'of as many real digits as are drawn below (the floor) {real["floor"]:.3f}')

    print_stage(2, 'the teacher: a DiT, converted from a PyTorch checkpoint', STAGES)
    checkpoint = train_the_teacher(workdir) if train_teacher else lab.TEACHER
    print_command(f'python convert_torch_ckpt.py {short(checkpoint)} --out {workdir / "teacher"} --overwrite')
    print(describe(convert(checkpoint, workdir / 'teacher', overwrite=True)))

    runs = [Run(workdir, arm, 0) for arm in DEMO]
    print_stage(3, f'{len(runs)} students for 5 % of its cost, sampled and judged', STAGES)
    for one in runs:
        print_command(one.command())
    pool.run_all(workdir, runs, functools.partial(lab.measure, workdir), ruler.tell,
                 {'teacher': workdir / 'teacher'})
    result = lab.collect(workdir) | real
    if train_teacher:
        write_card(checkpoint, workdir / 'teacher', result['teacher'], real)

    print_stage(4, 'a block of teacher and student, by the number of tokens', STAGES)
    result['blocks'] = measure_blocks({'teacher': load(workdir / 'teacher').arch,
                                       'student': load(runs[0].path).arch})
    result['seconds'] = round(time.perf_counter() - began)
    (workdir / 'figures.json').write_text(json.dumps(result, indent=1))

    print_stage(5, 'the report', STAGES)
    pages.write_demo_report(workdir, runs, result, recorded())
    print(pages.figures_as_text(result, recorded()))
    print(f'\n{format_seconds(time.perf_counter() - began)}. Open {workdir / "report.html"}')
    print_next(next_commands(workdir, runs[0].path))
    return 0


def recorded() -> dict:
    """The results of the lab that come with the demo."""
    return read_json(lab.RECORDED, absent={'teacher': {}, 'runs': []})


def next_commands(workdir: Path, student: Path) -> list[str]:
    one, teacher = quoted(student), quoted(workdir / 'teacher')
    return [f'python sample.py --grid_compare {teacher} {one} --classes 3,7 --cfg_scale 1.5 --out digits.png',
            f'python analyze.py --from {one} --teacher {teacher} --out {quoted(workdir / "analysis")}',
            f'python app.py --from={one} --teacher={teacher}      # needs pip install -e ".[demo]"']


def train_the_teacher(workdir: Path) -> Path:
    """Trains configs/mnist_dit.py and exports it with DiT's key names; returns the file."""
    out, trained = workdir / 'mnist_dit.safetensors', workdir / 'mnist_dit'
    print_command(f'python train.py --config=configs/mnist_dit.py --workdir={trained}')
    pool.train_alone(workdir, load_recipe('mnist_dit'), trained)
    print_command(f'python convert_torch_ckpt.py {trained} --to_torch --out {out} --overwrite')
    export(trained, out, overwrite=True)
    return out


def write_card(checkpoint: Path, teacher: Path, measured: Mapping, real: Mapping,
               name: str = 'mnist_dit') -> None:
    """The recipe `name` and the figures of a teacher, beside its file. Both can be copied to assets/.
    measured: by `lab.measure`. real: by `Ruler.real`."""
    config = load_recipe(name)
    drawn = ruler.settings_of(load(teacher))
    card = {
        'command': f'python train.py --config=configs/{name}.py --workdir=runs/{name}',
        'export': f'python convert_torch_ckpt.py runs/{name} --to_torch --out assets/{name}.safetensors',
        'seed': config.seed, 'steps': config.train.steps, 'batch_size': config.train.batch_size,
        'weights': 'ema', 'sha256': file_sha256(checkpoint), 'bytes': checkpoint.stat().st_size,
        'sampling': {name: config.sample[name] for name in ('method', 'steps', 'cfg_scale')},
        'versions': measured['versions'], 'date': measured['date'],
        'figures': {**{name: measured[name] for name in ('distance', 'kid', 'accuracy_unguided')},
                    'parameters': count_parameters(load(teacher).network),
                    **{name: real[name] for name in ('floor', 'judge_accuracy')},
                    'samples': {'unguided': ruler.COUNT, **drawn.to_json()}}}
    checkpoint.with_suffix('.json').write_text(json.dumps(card, indent=1) + '\n')
