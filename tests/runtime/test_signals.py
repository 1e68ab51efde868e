"""Signals of a command: heard at once, in order; saved first where there is something; a second one does not
wait."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import sys, threading, time
from pathlib import Path
from lit_jax.runtime import signals
signals.catch()
moment = sys.argv[1]
asked = threading.Event()
if moment == 'training':
    signals.save_first(asked.set, True).__enter__()
if moment in ('writing', 'stuck'):
    from lit_jax.runtime import claim, paths
    blocks = claim.claimed('out'), paths.open_whole(Path('other.npz'))
    blocks[0].__enter__(), blocks[1].__enter__().write(b'half')
if moment == 'over':
    class Late:      # the interpreter goes
        def __del__(self, write=__import__('os').write, sleep=time.sleep):
            write(1, b'ready\\n')
            sleep(1)
    late = Late()
    sys.exit(3)
if moment == 'stuck':
    signals.before_leaving(lambda: time.sleep(60))
print('ready', flush=True)
if moment == 'training':
    asked.wait(60)
    print('saving', flush=True)
time.sleep(60)
'''


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'term'])
def stop(request, tmp_path):
    """stop(moment, signals): (status, lines of stderr, seconds) of a program after one signal, or two."""
    started = []

    def stop(moment, count=1):
        process = subprocess.Popen([sys.executable, '-c', PROGRAM, moment], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                   env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        started.append(process)
        assert process.stdout.readline() == 'ready\n'
        began = time.monotonic()
        process.send_signal(request.param)
        if count == 2:
            if moment == 'training':
                assert process.stdout.readline() == 'saving\n'
            else:
                time.sleep(0.2)
            process.send_signal(request.param)
        said = process.communicate(timeout=20)[1].splitlines()
        return process.returncode, said, time.monotonic() - began

    stop.number = request.param
    yield stop
    for process in started:
        process.kill()


def test_a_signal_before_anything_is_written(stop):
    status, said, seconds = stop('early')
    assert (status, len(said)) == (75, 1) and 'stopped before anything was written' in said[0]
    assert seconds < 10


def test_a_second_signal_ends_a_training_at_once(stop):
    status, said, seconds = stop('training', 2)
    assert status == 128 + stop.number and len(said) == 2 and 'again: stopped at once' in said[1], said
    assert seconds < 10


@pytest.mark.slow
def test_what_is_half_written_goes_and_so_does_the_claim(stop, tmp_path):
    """What is whole stays."""
    (tmp_path / 'whole').write_text('x')
    status, said, _ = stop('writing')
    assert (status, len(said)) == (75, 1) and 'run the same command again' in said[0], said
    assert [path.name for path in tmp_path.iterdir()] == ['whole']


def test_a_command_that_is_done_keeps_its_status(stop):
    assert stop('over')[:2] == (3, [])


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_what_hangs(stop):
    status, said, seconds = stop('stuck', 2)
    assert (status, len(said)) == (75, 1) and seconds < 4, (said, seconds)
