"""Faults of disk, processes and signals on whole commands, as a user has them: one message, nothing lost."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz.worker import message_faults

ROOT = Path(__file__).parents[2]
SMALL = ('--config=digits_dit', '--config.model.depth=2', '--config.model.width=32',
         '--config.sample.every=0',
         '--config.data.name=synthetic', '--config.train.batch_size=32', '--config.checkpoint.every=50',
         '--config.log.every=5')
TEACHER = ROOT / 'assets' / 'digits_dit.safetensors'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp('compiled')


@pytest.fixture
def run(tmp_path, compiled):
    """run(script, *flags): a finished command. run.start(...): a running one, killed at the end."""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(compiled),
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'LIT_JAX_CACHE': str(tmp_path / 'cache')}
    started = []

    def start(script, *flags):
        process = subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], cwd=tmp_path, env=env,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        started.append(process)
        return process

    def finished(script, *flags, seconds=240):
        process = start(script, *flags)
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said

    finished.start = start
    yield finished
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextmanager
def mounted(folder: Path, *how: str):
    """A small or read-only disk; skips where this machine does not let us mount one."""
    folder.mkdir(exist_ok=True)
    command = ['mount', *how, folder]
    if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('nothing can be mounted here')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def steps(workdir: Path) -> list[int]:
    log = workdir / 'metrics.jsonl'
    return [json.loads(line)['step'] for line in log.read_text().splitlines()] if log.exists() else []


def until(process, workdir: Path, step: int, seconds: float = 300) -> None:
    """Waits until a run has logged `step`."""
    deadline = time.monotonic() + seconds
    while not (there := steps(workdir)) or there[-1] < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_one_message(status: int, said: str, name) -> None:
    assert status == 1 and 'Traceback' not in said, said
    error = said[said.rindex('error: '):]
    assert not message_faults(error, (str(name),)), said


def test_two_runs_in_one_workdir(run, tmp_path):
    """The second is refused in one message; the first goes on, with all its lines, and can be resumed."""
    workdir = tmp_path / 'run'
    first = run.start('train.py', *SMALL, f'--workdir={workdir}', '--config.train.steps=100000')
    until(first, workdir, 20)
    again = run('train.py', *SMALL, f'--workdir={workdir}', '--config.train.steps=100000', seconds=180)
    assert_one_message(*again, workdir)
    at = steps(workdir)[-1]
    until(first, workdir, at + 10)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=180)
    assert first.returncode == 75, said
    there = steps(workdir)
    assert there == list(range(5, there[-1] + 1, 5))
    at = there[-1]
    status, said = run('train.py', *SMALL, f'--workdir={workdir}', f'--config.train.steps={at + 10}')
    assert status == 0 and 'Traceback' not in said, said


def test_a_killed_run_leaves_no_lasting_claim(run, tmp_path):
    workdir = tmp_path / 'run'
    first = run.start('train.py', *SMALL, f'--workdir={workdir}', '--config.train.steps=100000')
    until(first, workdir, 60)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    status, said = run('train.py', *SMALL, f'--workdir={workdir}', '--config.train.steps=60')
    assert status == 0, said


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'term'])
def test_a_signal_at_any_moment_ends_a_run(run, tmp_path, number):
    """From its first line on; what it leaves can be trained on."""
    for attempt, delay in enumerate((0.5, 1, 2, 3, 4, 6, None)):      # None: once steps are taken
        workdir = tmp_path / f'run{attempt}'
        process = run.start('train.py', *SMALL, f'--workdir={workdir}', '--config.train.steps=100000')
        time.sleep(delay) if delay else until(process, workdir, 10)
        process.send_signal(number)
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 75 and 'Traceback' not in said, (delay, process.returncode, said)
    more = steps(workdir)[-1] + 5
    status, said = run('train.py', *SMALL, f'--workdir={workdir}', f'--config.train.steps={more}')
    assert status == 0, said


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'term'])
@pytest.mark.parametrize('command', [
    ('sample.py', '--from', '{model}', '--count', 4096, '--steps', 50, '--out', '{out}.npz'),
    ('sample.py', '--from', '{model}', '--steps', 250, '--out', '{out}.png'),
    ('convert_torch_ckpt.py', TEACHER, '--out', '{out}'),
    ('analyze.py', '--from', '{model}', '--data=digits', '--parts=loss', '--out', '{out}'),
    ('prepare_latents.py', '--data=folder', '--path={out}', '--vae={model}', '--out={out}'),
    ('evaluate.py', '--samples={out}.npz', '--reference={out}.npz'),
    ('train_vae.py', '--config=vae_tiny', '--config.data.path={model}', '--out={out}'),
    ('app.py', '--from={model}', '--port=0'),
], ids=['set', 'grid', 'convert', 'analyze', 'prepare', 'evaluate', 'vae', 'app'])
def test_a_signal_at_any_moment_ends_every_command(run, tmp_path, command, number):
    """With one line, status 75, and no claim; unless it was done, or had found what is wrong with it."""
    model = tmp_path / 'model'
    if '{model}' in str(command):
        assert run('convert_torch_ckpt.py', TEACHER, '--out', model)[0] == 0
    words = [str(part).format(out=tmp_path / 'out', model=model) for part in command]
    for delay in (0.5, 1, 2, 4, 8):
        process = run.start(*words)
        time.sleep(delay)
        over = process.poll()
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert 'Traceback' not in said, (delay, said)
        if over is not None or process.returncode in (0, 1):      # it was over, or about to be
            break
        assert process.returncode == 75 and said.count('stopped') == 1, (delay, process.returncode, said)
        left = [path.name for path in tmp_path.iterdir()]
        assert not [name for name in left if name.endswith('.claim') or '.partial.' in name], (delay, left)


def test_a_full_disk_stops_a_run_with_one_message(run, tmp_path):
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'size=1m', 'none') as disk:
        ended = run('train.py', *SMALL, f'--workdir={disk / "run"}', '--config.train.steps=60')
        assert_one_message(*ended, disk)


def test_a_full_disk_stops_images_with_one_message(run, tmp_path):
    """Nothing half-written stays that the same command, on a larger disk, would take for whole."""
    assert run('convert_torch_ckpt.py', TEACHER, '--out', tmp_path / 'model')[0] == 0
    draw = ('sample.py', '--from', tmp_path / 'model', '--count', 1024, '--steps', 2)
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'size=96k', 'none') as disk:
        for out in ('set.npz', 'images'):
            status, said = run(*draw, '--out', disk / out)
            assert_one_message(status, said, disk)
        assert not (disk / 'set.npz').exists()


@pytest.mark.parametrize('command', [
    ('train.py', *SMALL, '--config.train.steps=5', '--workdir={out}'),
    ('convert_torch_ckpt.py', TEACHER, '--out', '{out}'),
    ('sample.py', '--from', '{model}', '--count', 4, '--steps', 2, '--out', '{out}.npz'),
    ('sample.py', '--from', '{model}', '--classes', 1, '--steps', 2, '--out', '{out}.png'),
    ('analyze.py', '--from', '{model}', '--data=digits', '--parts=loss', '--out', '{out}'),
    ('evaluate.py', 'geneval', '--prompts_out', '{out}'),
], ids=['train', 'convert', 'set', 'grid', 'analyze', 'prompts'])
def test_a_folder_that_cannot_be_written(run, tmp_path, command):
    """A read-only disk, a file in the place of a folder, and a name that is too long: one message each."""
    model = tmp_path / 'model'
    if '{model}' in command:
        assert run('convert_torch_ckpt.py', TEACHER, '--out', model)[0] == 0
    (tmp_path / 'file').write_text('')
    places = [tmp_path / 'file' / 'out', tmp_path / ('x' * 300), tmp_path / 'disk' / 'out']
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', 'ro', 'none'):
        for out in places:
            status, said = run(*(str(part).format(out=out, model=model) for part in command))
            assert status == 1 and 'Traceback' not in said, (out, said)
            assert str(out)[:60] in said or out.name[:60] in said, said


def test_a_workdir_of_any_name(run, tmp_path):
    """What has a meaning in patterns has none in a path: the run is resumed, or refused before it begins."""
    workdir = tmp_path / 'run [1] *?'
    for count in (10, 15):
        status, said = run('train.py', *SMALL, f'--workdir={workdir}', f'--config.train.steps={count}')
        if status:
            assert_one_message(status, said, 'run [1]')
            assert not list((workdir / 'checkpoints').glob('*'))
            return
    assert steps(workdir) == [5, 10, 15]


def test_two_commands_with_one_output(run, tmp_path):
    """One of them draws the set, the other is refused; the set is whole."""
    import numpy as np
    assert run('convert_torch_ckpt.py', TEACHER, '--out', tmp_path / 'model')[0] == 0
    draw = ('sample.py', '--from', tmp_path / 'model', '--count', 512, '--steps', 4, '--out',
            tmp_path / 'set.npz')
    both = [run.start(*draw) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    statuses = sorted(process.returncode for process in both)
    assert statuses in ([0, 0], [0, 1]) and 'Traceback' not in ''.join(said), said
    with np.load(tmp_path / 'set.npz') as arrays:
        assert arrays['arr_0'].shape == (512, 8, 8, 3)
