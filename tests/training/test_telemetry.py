"""Metrics of an interval, the log file, and the line that a person reads."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.training import telemetry
from lit_jax.training.telemetry import Diverged, MetricsLog, StepMetrics, format_line, format_seconds, read_lines


def step_metrics(total, quarter_sums=(1, 0, 0, 0), quarter_counts=(2, 0, 0, 0), bad_leaf=-1):
    return {'loss/total': jnp.float32(total), 'grad/norm': jnp.float32(1),
            'quarter/mse': (jnp.array(quarter_sums, jnp.float32), jnp.array(quarter_counts, jnp.float32)),
            'grad/bad_leaf': jnp.int32(bad_leaf)}


def test_summary_averages_steps_and_weighs_quarters_by_examples():
    metrics = StepMetrics(['a'])
    metrics.add(1, step_metrics(1.0, (4, 0, 0, 0), (1, 0, 0, 0)))
    metrics.add(2, step_metrics(3.0, (2, 0, 0, 6), (3, 0, 0, 2)))
    metrics.fetch()
    record = metrics.summarise()
    assert record['loss/total'] == 2.0
    assert record['loss/mse_q1'] == 1.5 and record['loss/mse_q4'] == 3.0
    assert record['loss/mse_q2'] is None
    assert metrics.pending == []


def test_pending_metrics_survive_json_exactly():
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    straight, stopped = StepMetrics(['a']), StepMetrics(['a'])
    for i, value in enumerate(values):
        straight.add(i, step_metrics(value))
        stopped.add(i, step_metrics(value))
        if i == 3:
            stopped.fetch()
            stopped = StepMetrics(['a'], json.loads(json.dumps(stopped.pending)))
    straight.fetch()
    stopped.fetch()
    assert straight.summarise() == stopped.summarise()


@pytest.mark.parametrize('total, leaf, message', [
    (np.nan, 1, r'step 8: loss/total = nan; first non-finite gradient: blocks/b'),
    (1.0, 0, r'step 8: the losses are finite; first non-finite gradient: a'),
    (np.inf, -1, r'loss/total = inf; the gradients are finite')])
def test_the_first_bad_step_is_named(total, leaf, message):
    metrics = StepMetrics(['a', 'blocks/b'])
    metrics.add(7, step_metrics(1.0))
    metrics.add(8, step_metrics(total, bad_leaf=leaf))
    metrics.add(9, step_metrics(np.nan, bad_leaf=0))
    with pytest.raises(Diverged, match=message):
        metrics.fetch()


def test_the_log_drops_what_lies_after_the_resumed_step(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    log = MetricsLog(path, 0)
    for step in (10, 20, 30):
        log.write({'step': step})
    log.close()
    with path.open('a') as file:
        file.write('{"step": 4')           # a run killed in the middle of a line
    log = MetricsLog(path, 20)
    log.write({'step': 21})
    log.close()
    assert [record['step'] for record in read_lines(path)] == [10, 20, 21]


def test_an_absent_dashboard_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    def broken(workdir):
        raise ImportError('No module named wandb')

    monkeypatch.setitem(telemetry.SINKS, 'wandb', broken)
    assert telemetry.open_sink('wandb', tmp_path) is None
    assert 'wandb is off' in caplog.text


def test_tensorboard_can_read_what_its_sink_wrote(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    sink = telemetry.open_sink('tensorboard', tmp_path)
    sink.write(5, {'loss/total': 0.25})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss/total')] == [(5, 0.25)]


def test_the_line_has_what_a_person_looks_for():
    means = {'loss/total': 0.02, 'loss/mse': 0.015, 'loss/vb': 0.005, 'grad/norm': 0.1}
    timing = {'time/step_ms': 15.8, 'time/images_per_s': 8100.0, 'data/wait_percent': 0.4, 'time/eta_s': 192.0}
    line = format_line(1500, 15000, means, timing)
    for part in ('step 1,500/15,000', 'mse 0.0150', 'vb 0.0050', '8,100 img/s', 'data-wait 0.4 %', 'ETA 3m 12s'):
        assert part in line


@pytest.mark.parametrize('seconds, text', [(4.4, '4s'), (192, '3m 12s'), (11_520, '3h 12m')])
def test_durations_read_like_durations(seconds, text):
    assert format_seconds(seconds) == text
