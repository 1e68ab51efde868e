"""Trains on your own images, on a CPU: folder -> VAE -> cached latents -> DiT -> LiT -> images.

    python -m examples.photos --workdir photos  # `make photos`; needs scikit-image for its photographs

The stages are ordinary commands, each printed before it runs; finished stages are skipped. WORKDIR has their
logs, and figures.json with their times and results.
"""
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples.words import print_next, quoted
from lit_jax.runtime import alive, cli
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.options import option, parse_options
from lit_jax.runtime.progress import working
from lit_jax.training.metrics_log import read_lines

ROOT = Path(__file__).parents[2]


def stages(workdir: Path, steps: float = 1.0) -> dict[str, tuple[list[str], Path]]:
    """{name: (command without the interpreter, its output)}; `steps` < 1 shortens the trainings."""
    images, vae, latents = workdir / 'pictures', workdir / 'vae', workdir / 'latents'
    dit, lit = workdir / 'dit', workdir / 'lit'
    data = [f'--config.data.path={latents}', f'--config.latent.vae_path={vae}']

    def shortened(total):
        return [f'--config.train.steps={max(2, round(total * steps))}'] if steps != 1 else []

    return {
        'pictures': (['-m', 'lit_jax.data.toys.photos', '--out', str(images)], images),
        'vae': (['train_vae.py', '--config=configs/vae_tiny.py', f'--config.data.path={images}',
                 f'--out={vae}', *shortened(800)], vae),
        'latents': (['prepare_latents.py', '--data=folder', f'--path={images}', f'--vae={vae}',
                     '--image_size=64', f'--out={latents}', '--batch_size=32'], latents / 'metadata.json'),
        'dit': (['train.py', '--config=configs/folder_lit.py:dit', *data, f'--workdir={dit}',
                 *shortened(2_000)], dit / 'report.html'),
        'lit': (['train.py', '--config=configs/folder_lit.py', *data, f'--config.inherit.path={dit}',
                 f'--config.teacher.path={dit}', f'--workdir={lit}', *shortened(400)], lit / 'report.html'),
        'compare': (['sample.py', '--grid_compare', str(dit), str(lit), f'--vae={vae}', '--per_class=4',
                     '--cfg_scale=2', '--classes=' + ','.join(map(str, range(16))),
                     f'--out={workdir / "compare.png"}'], workdir / 'compare.png'),
        'set': (['sample.py', '--from', str(lit), f'--vae={vae}', '--count=128', '--cfg_scale=2',
                 f'--out={workdir / "lit.npz"}'], workdir / 'lit.npz'),
    }


def run(workdir: Path, steps: float = 1.0) -> dict:
    """Runs all unfinished stages; returns and writes {name: {'seconds', 'command', its results}}."""
    workdir.mkdir(parents=True, exist_ok=True)
    notes = workdir / 'figures.json'
    figures = read_json(notes, {}, absent={})
    for name, (command, output) in stages(workdir, steps).items():
        if name in figures and output.exists():
            continue
        print('$ python ' + ' '.join(command), flush=True)
        began = time.perf_counter()
        printed = _run(command, workdir / f'{name}.log')
        figures[name] = {'command': 'python ' + ' '.join(command),
                         'seconds': round(time.perf_counter() - began, 1), **_figures(name, printed, workdir)}
        notes.write_text(json.dumps(figures, indent=1))
        print('  ' + ', '.join(f'{key} {value}' for key, value in figures[name].items() if key != 'command'),
              flush=True)
    return figures


def _run(command: list[str], log: Path) -> str:
    """Runs a stage; writes its output to `log` and returns it. UserError with the end of it if it fails."""
    env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str((log.parent / 'compiled').absolute()),
           alive.PARENT: str(os.getpid()), 'PYTHONUNBUFFERED': '1'}
    with (open(log, 'w') as file, working(lambda: _last_line(log)),
          subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                           stdout=file, stderr=subprocess.STDOUT) as process):
        try:
            process.wait()
        finally:
            process.terminate()      # if this was interrupted
    printed = log.read_text()
    if process.returncode:
        raise UserError(f'`python {" ".join(command)}` ended with {process.returncode}:\n{printed[-2000:]}')
    return printed


def _last_line(log: Path) -> str:
    """How far a stage is, by the end of its log."""
    lines = log.read_text().split('\n') if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), 'starting')
    return f'{log.stem}: {last.strip()[:150]}   (log: {log})'


def _figures(name: str, printed: str, workdir: Path) -> dict:
    if name == 'vae':
        return {'psnr_db': float(re.search(r'PSNR ([\d.]+) dB', printed)[1])}
    if name in ('dit', 'lit'):
        last = read_lines(workdir / name / 'metrics.jsonl')[-1]
        return {'steps': last['step'], 'mse': round(last['loss/mse'], 4)}
    return {}


@dataclass(frozen=True)
class PhotosOptions:
    workdir: Path = option('output folder', default=Path('demo/photos'))


def main() -> None:
    options = parse_options(PhotosOptions, prog='python -m examples.photos', description=__doc__)
    workdir = options.workdir.absolute()
    seconds = sum(stage['seconds'] for stage in run(workdir).values())
    print(f'{seconds:.0f} s in total. Open {workdir / "compare.png"}')
    vae, lit, dit, analysis = (quoted(workdir / name) for name in ('vae', 'lit', 'dit', 'analysis'))
    print_next([line.replace(f'{Path.cwd()}/', '') for line in (
        f'python sample.py --from={lit} --vae={vae} --classes=0,1,2 --cfg_scale=2 --out=photos.png',
        f'python analyze.py --from={lit} --out={analysis}',
        f'python app.py --from={lit} --teacher={dit} --vae={vae}      # pip install -e ".[demo]"')])


if __name__ == '__main__':
    cli.run(main)
