"""The frame of the commands: what a terminal gets to see."""
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax.runtime import alive, cli
from lit_jax.runtime.errors import UserError, printable, reason_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No threads, no signals, and the handlers of the tests as they were."""
    monkeypatch.setattr(alive.Alive, 'start', lambda self, greeting: None)
    monkeypatch.setattr(alive, 'stop_with_parent', lambda: None)
    monkeypatch.setattr(cli.signals, 'catch', lambda: None)
    monkeypatch.setattr(cli.signals, 'say_with', lambda say: None)
    root, own = logging.getLogger(), logging.getLogger('lit_jax')
    before = root.handlers[:], root.level, own.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def test_a_message_cannot_steer_the_terminal(capsys):
    def main():
        logging.getLogger('lit_jax').warning('a line with %s', '\x1b[2J\x07')
        raise UserError('models/\x1b]0;title\x07 is damaged:\n  two lines of \udcff and é')

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    said = stopped.value.code + capsys.readouterr().err
    assert said.startswith(r'error: models/\x1b]0;title\x07 is damaged:' + '\n  two lines of ')
    assert r'\udcff and é' in said and r'a line with \x1b[2J\x07' in said
    assert printable(said) == said


@pytest.mark.parametrize('error, said', [
    (KeyError('pool'), "there is no 'pool'"), (OSError(13, 'Permission denied', '/a/b'), 'Permission denied'),
    (ValueError(), 'no reason is given'), (RuntimeError('first\nsecond'), 'first'),
    (ValueError('\x1b[2J' + 'x' * 999), r'\x1b[2J' + 'x' * 290 + '...')])
def test_what_an_error_of_another_library_says(error, said):
    assert reason_of(error) == said


def test_a_folder_that_is_gone_under_the_command_is_told(tmp_path):
    command = f'unset PYTHONPATH; mkdir gone; cd gone; rmdir ../gone; {sys.executable} {ROOT}/train.py --help'
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'error: the folder that this was started in' in done.stderr, done


def test_errors_that_orbax_logs_and_raises_are_told_once(capsys):
    cli.setup_logging()
    try:
        raise OSError('no space')
    except OSError:
        logging.getLogger('absl').exception('a save failed')
        logging.getLogger('lit_jax').exception('ours')
    said = capsys.readouterr().err
    assert 'a save failed' not in said and 'ours' in said
