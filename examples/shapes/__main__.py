"""Text to image on a CPU: PixArt and T5 checkpoints -> convert -> inherit -> distil -> draw -> score.

    python -m examples.shapes                     starts from the teacher and the text encoder in assets/
    python -m examples.shapes --seeds 3           three students, as in docs/train/text_to_image.md
    python -m examples.shapes --train_teacher     trains both first

The images are rendered shapes with captions ("a red circle left of a blue square"); an exact detector scores
the six tasks of GenEval. The same command resumes an interrupted run. The result is WORKDIR/report.html.
"""
import functools
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from examples.students import Student
from examples.words import PACKAGES, print_command, print_next, print_stage, quoted, short
from lit_jax import UserError
from lit_jax.diffusion.settings import recorded
from lit_jax.recipes.recipe import load_recipe
from lit_jax.runtime import cli
from lit_jax.runtime.options import option, parse_options
from lit_jax.runtime.paths import file_sha256
from lit_jax.runtime.shipped import find_asset

TEACHER, ENCODER = find_asset('shapes_pixart.safetensors'), find_asset('shapes_t5')
ARMS = ('distilled', 'aligned', 'scratch')       # of examples/students.py
# 5 % of the teacher's multiply-accumulates: a step of alignment costs 0.63 of one of the teacher's steps, one
# of distillation 1.34.
ALIGNED = {'align.steps': 650, 'align.learning_rate': 1e-2, 'train.steps': 380, 'train.warmup_steps': 0,
           'train.cooldown_steps': 285}
STAGES = ('first', 'refine')          # of configs/shapes_pixart.py


def student(workdir: Path, arm: str, seed: int) -> Student:
    """configs/shapes_lit.py with this demo's teacher and text encoder."""
    return Student(workdir, arm, seed, 'shapes_lit', {'text.encoder_path': str(workdir / 'text_encoder'),
                                                        **(ALIGNED if arm == 'aligned' else {})})


def run(workdir: Path, *, seeds: int, train_teacher: bool) -> int:
    """Runs all stages, writes `figures.json` and `report.html` in `workdir`; returns the exit status."""
    from examples import pool
    from examples.shapes import figures as shapes_figures
    from examples.shapes import pages as shapes_pages
    from lit_jax.convert.text_encoder_torch import convert_text_encoder, describe_text_encoder
    from lit_jax.convert.torch_import import convert, describe
    from lit_jax.runtime.progress import format_seconds
    began = time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)
    pool.keep_compiled_programs(workdir)
    teacher, encoder = train_both(workdir) if train_teacher else (TEACHER, ENCODER)

    print_stage(1, 'the text encoder: a T5, converted from a Hugging Face folder')
    print_command(f'python convert_torch_ckpt.py {short(encoder)} --text_dtype float32 --out '
                  f'{workdir / "text_encoder"} --overwrite')
    print(describe_text_encoder(convert_text_encoder(encoder, workdir / 'text_encoder', text_dtype='float32',
                                                     text_id='lit_jax/shapes_t5', overwrite=True)))
    print_stage(2, 'the teacher: a PixArt, converted from a PyTorch checkpoint')
    print_command(f'python convert_torch_ckpt.py {short(teacher)} --out {workdir / "teacher"} --overwrite')
    print(describe(convert(teacher, workdir / 'teacher', overwrite=True)))

    students = [student(workdir, arm, seed) for arm in ARMS
                for seed in range(seeds if arm == 'distilled' else 1)]
    print_stage(3, f'{len(students)} students: trained, then scored on 84 prompts')
    for one in students:
        print_command(one.command())
    measure = functools.partial(shapes_figures.measure, workdir / 'text_encoder')
    runs = pool.run_all(workdir, students, measure, shapes_figures.tell, {'teacher': workdir / 'teacher'})
    models = {'teacher': workdir / 'teacher', **{arm: student(workdir, arm, 0).path for arm in ARMS}}
    result = shapes_figures.summarise(runs, models, teacher_steps())
    result['seconds'] = round(time.perf_counter() - began)
    (workdir / 'figures.json').write_text(json.dumps(result, indent=1))
    if train_teacher:
        write_card(teacher, encoder, result)

    print_stage(4, 'the report')
    shapes_pages.write_report(workdir, models, result)
    print(shapes_pages.figures_as_text(result))
    print(f'\n{format_seconds(time.perf_counter() - began)}. Open {workdir / "report.html"}')
    print_next(next_commands(workdir))
    return 0


def next_commands(workdir: Path) -> list[str]:
    one, teacher, encoder = map(quoted, (student(workdir, 'distilled', 0).path, workdir / 'teacher',
                                         workdir / 'text_encoder'))
    return [f'python sample.py --from={one} --text_encoder={encoder} --cfg_scale=1.5 '
            '--prompt="two red circles" --seeds=0,1,2,3 --out=circles.png',
            f'python train.py --config=configs/shapes_lit.py --config.text.encoder_path={encoder} '
            f'--config.teacher.path={teacher} --config.inherit.path={teacher} --dry_run',
            f'python app.py --from={one} --text_encoder={encoder}      # pip install -e ".[demo]"']


def teacher_steps() -> int:
    """Of both its runs: the second starts from the weights of the first."""
    return sum(load_recipe(f'shapes_pixart:{stage}').train.steps for stage in STAGES)


def train_both(workdir: Path) -> tuple[Path, Path]:
    """Trains teacher and text encoder, and exports them with their original key names; (file, folder)."""
    from examples import pool
    from examples.shapes.encoder import train_encoder
    from lit_jax.convert.text_encoder_torch import export_text_encoder
    from lit_jax.convert.torch_export import export
    trained, folder = workdir / 'shapes_t5_trained', workdir / 'shapes_t5'
    file = workdir / 'shapes_pixart.safetensors'
    print_command(f'python -m examples.shapes.encoder --out {trained}')
    if not trained.exists():
        train_encoder(trained)
    export_text_encoder(trained, folder, overwrite=True)
    for stage, path in zip(STAGES, (workdir / 'shapes_pixart_first', workdir / 'shapes_pixart'), strict=True):
        config = load_recipe(f'shapes_pixart:{stage}')
        config.text.encoder_path = str(trained)
        if stage == 'refine':
            config.inherit.path = str(workdir / 'shapes_pixart_first')
        print_command(f'python train.py --config=configs/shapes_pixart.py:{stage} '
                      f'--config.text.encoder_path={trained} --config.inherit.path={config.inherit.path!r} '
                      f'--workdir={path}')
        pool.train_alone(workdir, config, path)
    export(workdir / 'shapes_pixart', file, overwrite=True)
    return file, folder


def write_card(teacher: Path, encoder: Path, result: dict) -> None:
    """The recipe and the figures of both, beside the teacher's file. All can be copied to assets/."""
    config, row = load_recipe('shapes_pixart:refine'), result['rows'][0]
    card = {
        'command': 'python -m examples.shapes --train_teacher --workdir=demo/shapes_full',
        'seed': config.seed, 'steps': row['steps'], 'batch_size': config.train.batch_size, 'weights': 'ema',
        'sampling': recorded(config.sample), 'sha256': file_sha256(teacher),
        'text_encoder': {file.name: file_sha256(file) for file in sorted(encoder.iterdir())},
        'bytes': teacher.stat().st_size + sum(file.stat().st_size for file in encoder.iterdir()),
        'versions': {'python': platform.python_version(), **{name: version(name) for name in PACKAGES}},
        'figures': {name: row[name] for name in dict.fromkeys(('overall', *row['runs'][0], 'parameters'))},
        'samples': result['samples'],
    }
    teacher.with_suffix('.json').write_text(json.dumps(card, indent=1) + '\n')


@dataclass(frozen=True)
class ShapesOptions:
    workdir: Path = option('output folder', default=Path('demo/shapes'))
    seeds: int = option('number of distilled students, each on one core', default=1)
    train_teacher: bool = option('train teacher and text encoder first', default=False)


def main() -> int:
    args = parse_options(ShapesOptions, prog='python -m examples.shapes', description=__doc__)
    if args.seeds < 1:
        raise UserError('--seeds must be at least 1')
    return run(args.workdir, seeds=args.seeds, train_teacher=args.train_teacher)


if __name__ == '__main__':
    cli.run(main)
