"""Measures, in the first minutes on a GPU, everything that was decided on a CPU or from data sheets.

    python -m benchmarks.gpu --minutes 8 --out gpu.json     # again with the same --out: goes on where it was
    python -m benchmarks.gpu --tiny --out /tmp/tiny.json    # all stages, small, on a CPU

Stages in the order of value: ceilings of the machine; it runs at all, bfloat16, attention against the plain
form; forms of the convolution and of linear attention; one block against PyTorch; the whole step against
PyTorch; resolution and heads; text to image against diffusers. Each stage is a process with a time limit of
its own and writes every row when it is measured: what is stopped loses nothing. A row that fails is kept with
its error and measured again by the next call. OUT with the ending .md has the table.
"""
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu_stages import STAGES
from benchmarks.timing import make_parser
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import write_text_atomic

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, MemoryError,
            AssertionError, SystemExit)
PACKAGES = ('jax', 'jaxlib', 'flax', 'torch', 'diffusers', 'numpy')


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--minutes', type=float, default=8, help='for all stages together')
    parser.add_argument('--out', default='gpu.json', help='results; an existing file is gone on with')
    parser.add_argument('--tiny', action='store_true', help='the smallest sizes, for a CPU')
    parser.add_argument('--stages', default=','.join(STAGES), help='some of them, comma separated')
    parser.add_argument('--stage', choices=list(STAGES), help='run this stage here, in this process')
    return parser.parse_args()


def run_stage(name: str, out: str, tiny: bool) -> None:
    """Measures the rows of a stage that are missing in `out`."""
    from flax.errors import FlaxError
    for row, measure in STAGES[name][0](tiny):
        found = read_json(out, dict)
        kept = found['stages'].setdefault(name, {})
        if row in kept and 'error' not in kept[row]:
            continue
        began = time.perf_counter()
        try:
            result = measure()
        except (*FAILURES, FlaxError) as error:      # of any library; must not cost the rows behind it
            last = traceback.extract_tb(error.__traceback__)[-1]
            result = {'error': f'{error} ({Path(last.filename).name}:{last.lineno})'[:2000]}
        kept[row] = {**result, 'took_s': round(time.perf_counter() - began, 1)}
        write_text_atomic(out, json.dumps(found, indent=1) + '\n')
        print(f'{name}: {row}: {kept[row]}', flush=True)


def finished(command: list[str], seconds: float) -> bool:
    """Runs a command for so long at most; stopped, with all that it started."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:      # also what it left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def about_machine() -> dict:
    """Versions, device and its clocks."""
    import jax
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        query = '--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit'
        clocks = subprocess.run(['nvidia-smi', query, '--format=csv'], capture_output=True, text=True,
                                timeout=20, check=False).stdout
    except OSError:
        clocks = ''
    return {'device': device.device_kind, 'platform': device.platform, 'python': platform.python_version(),
            'versions': versions, 'clocks': clocks, 'date': datetime.date.today().isoformat()}


def table(found: dict) -> str:
    """Markdown of all rows."""
    machine = found['machine']
    lines = [f'{machine["device"]} ({machine["date"]}), Python {machine["python"]}, '
             + ', '.join(f'{name} {version}' for name, version in machine['versions'].items() if version), '']
    for stage, rows in found['stages'].items():
        lines += [f'**{stage}**', '', '| what | figures |', '|---|---|']
        for row, figures in rows.items():
            cells = [f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
                     for name, value in figures.items() if name != 'took_s' and value is not None]
            lines.append(f'| {row} | {", ".join(cells)} |'.replace('\n', ' '))
        lines.append('')
    return '\n'.join(lines)


def main() -> None:
    options = parse_arguments()
    if options.stage:
        return run_stage(options.stage, options.out, options.tiny)
    deadline = time.monotonic() + 60 * options.minutes
    found = read_json(options.out, dict, absent={'stages': {}})
    if 'machine' not in found:
        code = 'import json; from benchmarks.gpu import about_machine; print(json.dumps(about_machine()))'
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
        found['machine'] = json.loads(done.stdout.splitlines()[-1])
        write_text_atomic(options.out, json.dumps(found, indent=1) + '\n')
    chosen = [name for name in STAGES if name in options.stages.split(',')]
    for number, name in enumerate(chosen):
        left = deadline - time.monotonic()
        # Its share of what is left: what a stage does not need goes to those behind it.
        limit = left * STAGES[name][1] / sum(STAGES[other][1] for other in chosen[number:])
        if limit < 1:
            print(f'{name}: no time left; the same command goes on here', flush=True)
            break
        command = [sys.executable, '-m', 'benchmarks.gpu', f'--stage={name}', f'--out={options.out}']
        if not finished(command + ['--tiny'] * options.tiny, limit):
            print(f'{name}: stopped after {limit:.0f} s; the same command goes on there', flush=True)
        write_text_atomic(Path(options.out).with_suffix('.md'), table(read_json(options.out, dict)) + '\n')


if __name__ == '__main__':
    main()
