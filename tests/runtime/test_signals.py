"""Signals of a command: heard at once, saved first, a second one does not wait."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = '''
import sys, threading, time
from lit_jax.runtime import signals
signals.catch()
asked = threading.Event()
if sys.argv[1] == 'late':
    signals.save_first(asked.set, True).__enter__()
print('ready', flush=True)
if sys.argv[1] == 'late':
    asked.wait(60)
    print('saving', flush=True)
time.sleep(60)
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'term'])
@pytest.mark.parametrize('moment', ['early', 'late'])
def test_a_signal_is_heard_and_a_second_one_ends_at_once(number, moment):
    process = subprocess.Popen([sys.executable, '-c', PROGRAM, moment], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == 'ready\n'
    began = time.monotonic()
    process.send_signal(number)
    if moment == 'late':
        assert process.stdout.readline() == 'saving\n'
        process.send_signal(number)
    said = process.communicate(timeout=20)[1].splitlines()
    assert time.monotonic() - began < 10
    assert process.returncode == (75 if moment == 'early' else 128 + number)
    assert len(said) == (1 if moment == 'early' else 2), said
    assert 'to save' in said[0] if moment == 'early' else 'again: stopped at once' in said[1]
