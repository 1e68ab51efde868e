"""The profile window: what is a window, and that exactly its steps are traced."""
import logging

import jax
import jax.numpy as jnp
import pytest

from lit_jax.runtime.errors import UserError
from lit_jax.training import profile
from lit_jax.training.profile import ProfileWindow, parse_window


@pytest.mark.parametrize('text, window',
                         [('20-25', (20, 25)), ('steps 20-25', (20, 25)), (' 20 - 25 ', (20, 25)),
                          ('7', (7, 7)), ('step 7', (7, 7))])
def test_a_window_is_two_steps_or_one(text, window):
    assert parse_window(text) == window


@pytest.mark.parametrize('text', ['', 'all', '20-', '-5', '20..25', '1-2-3', '2.5-4', '25-20', '0-3'])
def test_a_wrong_window_is_refused(text):
    with pytest.raises(UserError, match='--profile='):
        parse_window(text)


@jax.jit
def work(x):
    return {'loss': (x @ x).sum()}


def drive(window, steps, monkeypatch):
    """Calls a window like the loop does; returns what the profiler was told, with the steps between."""
    events = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda *args, **kwargs: events.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: events.append('stop'))
    for step in steps:
        window.before(step)
        events.append(step)
        window.after(step, jnp.float32(step))
    window.close()
    return events


@pytest.mark.parametrize('window, steps, expected', [
    ((3, 4), range(1, 7), [1, 2, 'start', 3, 4, 'stop', 5, 6]),
    ((1, 1), range(1, 3), ['start', 1, 'stop', 2]),
    ((2, 5), range(4, 8), ['start', 4, 5, 'stop', 6, 7]),               # resumed inside
    ((2, 3), range(4, 6), [4, 5]),                                      # resumed after
    ((2, 9), range(1, 4), [1, 'start', 2, 3, 'stop']),                  # ended inside
    ((8, 9), range(1, 3), [1, 2]),                                      # ended before
    (None, range(1, 3), [1, 2])])
def test_exactly_the_steps_of_the_window_are_traced(tmp_path, monkeypatch, window, steps, expected):
    assert drive(ProfileWindow(tmp_path, window), steps, monkeypatch) == expected


@pytest.mark.parametrize('window, steps, message', [
    ((2, 3), range(4, 7), 'this call starts at step 4'),
    ((8, 9), range(1, 3), 'the run ended before the window')])
def test_a_window_that_cannot_be_met_is_said_once(tmp_path, monkeypatch, caplog, window, steps, message):
    drive(ProfileWindow(tmp_path, window), steps, monkeypatch)
    assert caplog.text.count(message) == 1


def test_only_the_borders_wait_for_the_device(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(profile.jax, 'block_until_ready', waited.append)
    drive(ProfileWindow(tmp_path, (3, 5)), range(1, 9), monkeypatch)
    assert [float(value) for value in waited] == [2, 5]


def test_a_profiler_that_is_taken_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def taken(*args, **kwargs):
        raise RuntimeError('Profile has already been started.')

    window = ProfileWindow(tmp_path, (1, 2))
    monkeypatch.setattr(jax.profiler, 'start_trace', taken)
    for step in (1, 2, 3):
        window.before(step)
        window.after(step, jnp.float32(step))
    window.close()
    assert caplog.text.count('the profiler is off') == 1


def test_a_trace_of_the_steps_appears(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'lit_jax')
    pauses = []
    window, x = ProfileWindow(tmp_path / 'profile', (3, 4), paused=pauses.append), jnp.ones((256, 256))
    for step in range(1, 6):
        window.before(step)
        window.after(step, work(x))
    window.close()
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    assert trace.stat().st_size > 4_000
    steps, names = set(), set()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                names.add(event.name)
                steps |= {value for name, value in event.stats if event.name == 'train'
                          and name == 'step_num'}
    assert steps == {3, 4} and any('Execute' in name for name in names)
    assert f'tensorboard --logdir={tmp_path / "profile"}' in caplog.text
    assert len(pauses) == 2 and all(seconds > 0 for seconds in pauses)
