"""The stations of the demo. Each runs the same functions as the scripts at the top, and prints the command it stands for."""
import json
import logging
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from lit_jax.checkpoint.load import load
from lit_jax.checkpoint.torch_export import export
from lit_jax.checkpoint.torch_import import convert
from lit_jax.config import load_recipe
from lit_jax.data.sources import open_source
from lit_jax.demo import figures, pages
from lit_jax.evaluation.digits_judge import Judge, load_judge, train_judge
from lit_jax.training import loop
from lit_jax.training.telemetry import format_seconds

LOG = logging.getLogger('lit_jax')
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'assets' / 'digits_dit.safetensors'
# What is compared under the same recipe and steps: the whole method, then one part of it left out after the other.
ARMS = {
    'distilled': {},
    'inherited': {'teacher': ''},
    'scratch': {'teacher': '', 'inherit': ''},
}


def travel(workdir: Path, *, seeds: int, train_teacher: bool) -> int:
    """Runs every station, writes `figures.json` and `report.html` in `workdir`, and returns the exit status."""
    began = time.perf_counter()
    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').absolute()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

    _station(1, 'a judge: a small classifier of real digits')
    judge = get_judge(workdir)

    _station(2, 'the teacher: a DiT, as a PyTorch checkpoint, converted')
    checkpoint = train_the_teacher(workdir) if train_teacher else SHIPPED
    _command(f'python convert_torch_ckpt.py {checkpoint} --out {workdir / "teacher"}')
    convert(checkpoint, workdir / 'teacher', overwrite=True)
    teacher = load(workdir / 'teacher', scan_layers=False)

    _station(3, f'students: {len(ARMS)} kinds, {seeds} seed(s) each')
    students = {arm: [train_student(workdir, arm, seed) for seed in range(seeds)] for arm in ARMS}

    _station(4, 'samples and figures')
    result = figures.measure_all(workdir, judge, teacher, students)
    result['seconds'] = round(time.perf_counter() - began)
    (workdir / 'figures.json').write_text(json.dumps(result, indent=1))

    _station(5, 'the report')
    pages.write_demo_report(workdir, judge, teacher, students, result)
    print(pages.figures_as_text(result))
    print(f'\n{format_seconds(result["seconds"])}. Open {workdir / "report.html"}')
    return 0


def get_judge(workdir: Path) -> Judge:
    """The judge of this workdir, trained on the real training split the first time."""
    path = workdir / 'judge.npz'
    if not path.exists():
        data = figures.all_of(open_source('digits', split='train'))
        train_judge(data['image'], data['label']).save(path)
    return load_judge(path)


def train_the_teacher(workdir: Path) -> Path:
    """Fits configs/digits_dit.py and exports it in DiT's own key names; returns the file."""
    config = load_recipe(ROOT / 'configs' / 'digits_dit.py')
    out = workdir / 'digits_dit.safetensors'
    _command(f'python train.py --config=configs/digits_dit.py --workdir={workdir / "digits_dit"}')
    loop.train(config, workdir / 'digits_dit')
    _command(f'python convert_torch_ckpt.py {workdir / "digits_dit"} --to_torch --out {out}')
    export(workdir / 'digits_dit', out, overwrite=True)
    return out


def student_recipe(workdir: Path, arm: str, seed: int) -> ConfigDict:
    """configs/digits_lit.py with this demo's teacher, less what the arm leaves out."""
    config = load_recipe(ROOT / 'configs' / 'digits_lit.py')
    config.name, config.seed = f'digits_lit_{arm}', seed
    config.teacher.path = ARMS[arm].get('teacher', str(workdir / 'teacher'))
    config.inherit.path = ARMS[arm].get('inherit', str(workdir / 'teacher'))
    return config


def train_student(workdir: Path, arm: str, seed: int) -> Path:
    """Fits one student and returns its workdir."""
    config, path = student_recipe(workdir, arm, seed), workdir / f'{arm}_{seed}'
    _command(f'python train.py --config=configs/digits_lit.py --config.seed={seed} --config.name={config.name} '
             f'--config.teacher.path={config.teacher.path!r} --config.inherit.path={config.inherit.path!r} '
             f'--workdir={path}')
    loop.train(config, path)
    return path


def _station(number: int, title: str) -> None:
    print(f'\n=== {number}/5 {title}', flush=True)


def _command(text: str) -> None:
    print(f'$ {text}', flush=True)
