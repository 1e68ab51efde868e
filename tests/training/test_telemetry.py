"""Metrics of an interval, the log file, and the line that a person reads."""
import json
import logging
import os
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import Store, bucket  # noqa: F401
from etils import epath

from lit_jax.runtime.chips import find_chip
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path
from lit_jax.runtime.progress import format_seconds
from lit_jax.training import metrics_log, sinks
from lit_jax.training.metrics_log import MetricsLog
from lit_jax.training.speed import RunClock, hbm_peak, peak_flops
from lit_jax.training.telemetry import Diverged, Reporter, StepMetrics, format_flops, format_line, read_lines


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


def test_a_damaged_log_does_not_stop_a_run_and_says_so_once(tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n\0\n[]\n{"step": 2}\n')
    assert [record['step'] for record in read_lines(path)] == [1, 2]
    assert len(caplog.records) == 1 and '3 such lines are left out' in caplog.text
    path.write_bytes(b'')
    assert read_lines(path) == []


def test_an_absent_dashboard_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    def broken(workdir, recipe):
        raise ImportError('No module named wandb')

    monkeypatch.setitem(sinks.SINKS, 'wandb', broken)
    assert sinks.open_sink('wandb', tmp_path) is None
    assert 'wandb is off: No module named wandb (pip install "lit_jax[wandb]")' in caplog.text


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for W&B's package; `wandb.fails` names the call that fails as if nobody were logged in."""
    module, errors = types.ModuleType('wandb'), types.ModuleType('wandb.errors')
    errors.Error = type('Error', (Exception,), {})
    module.errors, module.calls, module.fails = errors, [], ''

    def call(name):
        def record(*values, **options):
            module.calls.append((name, values, options))
            if module.fails == name:
                raise errors.Error('api_key not configured (no-tty)')
            return module
        return record
    module.init, module.log, module.finish, module.Image = map(call, ('init', 'log', 'finish', 'Image'))
    monkeypatch.setenv('WANDB_LOGIN_TIMEOUT', 'x')      # to be put back after the test
    monkeypatch.delenv('WANDB_LOGIN_TIMEOUT')
    monkeypatch.setitem(sys.modules, 'wandb', module)
    monkeypatch.setitem(sys.modules, 'wandb.errors', errors)
    return module


@pytest.mark.parametrize('fails, calls', [
    ('', ['init', 'log', 'log', 'Image', 'log', 'finish']), ('init', ['init']), ('log', ['init', 'log']),
    ('Image', ['init', 'log', 'log', 'Image']), ('finish', ['init', 'log', 'log', 'Image', 'log', 'finish'])])
def test_wandb_gets_recipe_numbers_and_samples_and_its_failures_are_warnings(wandb, tmp_path, caplog, fails,
                                                                             calls):
    wandb.fails = fails
    (tmp_path / 'run').mkdir()
    recipe = {'log': {'wandb_project': 'mine', 'wandb_name': 'first'}, 'seed': 3}
    reporter = Reporter(tmp_path / 'run', step=0, total_steps=2, batch_size=4, sinks=['wandb'], recipe=recipe)
    for step in (1, 2):
        reporter.tick()
        reporter.interval(step, {'loss/total': 0.5, 'grad/norm': 1.0})
    reporter.drawn(2, np.zeros((4, 4, 3), np.uint8))
    reporter.close()
    assert [name for name, _, _ in wandb.calls] == calls
    started = wandb.calls[0][2]
    assert (started['project'], started['name'], started['config']) == ('mine', 'first', recipe)
    assert os.environ['WANDB_LOGIN_TIMEOUT'] == '30'      # on a terminal it asks
    assert ('no-tty) (`wandb login`, or WANDB_MODE=offline)' in caplog.text) == bool(fails)
    assert [record['step'] for record in read_lines(tmp_path / 'run' / 'metrics.jsonl')] == [1, 2]
    wandb.fails = ''
    sinks.open_sink('wandb', tmp_path / 'other')
    assert (wandb.calls[-1][2]['project'], wandb.calls[-1][2]['name']) == ('lit_jax', 'other')


def test_tensorboard_can_read_what_its_sink_wrote(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    sink = sinks.open_sink('tensorboard', tmp_path)
    sink.write(5, {'loss/total': 0.25})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars('loss/total')] == [(5, 0.25)]


def test_event_files_are_not_written_to_a_bucket_and_the_run_goes_on(caplog):
    assert sinks.open_sink('tensorboard', epath.Path('gs://bucket/run')) is None
    assert 'tensorboard is off' in caplog.text and 'metrics.jsonl' in caplog.text


def test_a_dashboard_that_fails_later_is_dropped_and_the_others_go_on(caplog):
    class Sink:
        def __init__(self, broken):
            self.broken, self.steps = broken, []

        def write(self, step, scalars):
            if self.broken:
                raise OSError('no space left')
            self.steps.append(step)

        def close(self):
            if self.broken:
                raise RuntimeError('gone')

    broken, sound = Sink(True), Sink(False)
    both = {'a': broken, 'b': sound}
    for step in (1, 2):
        sinks.write_all(both, step, {'loss/total': 1.0})
    assert sound.steps == [1, 2] and list(both) == ['b']
    assert caplog.text.count('a is off from step 1 on: no space left') == 1
    sinks.close_all({'a': broken, 'b': sound})
    assert 'a could not be closed: gone' in caplog.text


@pytest.fixture
def puts(monkeypatch):
    """Grows with each object that the log puts into a bucket."""
    done, put = [], metrics_log.write_text_atomic
    monkeypatch.setattr(metrics_log, 'write_text_atomic',
                        lambda path, text: (put(path, text), done.append(text)))
    return done


def test_in_a_bucket_the_log_is_written_whole_now_and_then(bucket, puts):  # noqa: F811
    path = as_path(bucket) / 'runs' / 'a' / 'metrics.jsonl'
    path.write_text('{"step": 10}\n{"step": 30}\n')
    log = MetricsLog(path, 20, rewrite_s=1e9)
    assert log.last == {'step': 10} and read_lines(path) == [{'step': 10}]
    for step in (20, 21):
        log.write({'step': step})
    assert len(puts) == 1
    log.flush()
    log.flush()                                     # nothing new: nothing is sent
    assert len(puts) == 2
    log.write({'step': 22})
    log.close()
    assert [record['step'] for record in read_lines(path)] == [10, 20, 21, 22]
    soon = MetricsLog(path, 30, rewrite_s=0.0)
    soon.write({'step': 23})
    assert read_lines(path)[-1] == {'step': 23}


def test_a_bucket_that_does_not_answer_for_a_while_is_written_later(
        bucket, monkeypatch, caplog):  # noqa: F811
    path = as_path(bucket) / 'metrics.jsonl'
    log = MetricsLog(path, 0, rewrite_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Store, 'broken', OSError('503'))
        log.write({'step': 1})
        with pytest.raises(UserError, match='cannot be reached: 503'):
            MetricsLog(path, 0)
    assert caplog.text.count('is behind: gs://bucket/metrics.jsonl cannot be reached: 503') == 1
    log.close()
    assert read_lines(path) == [{'step': 1}]


def test_a_run_in_a_bucket_has_its_log_there(bucket):  # noqa: F811
    workdir = as_path(bucket) / 'runs' / 'a'
    reporter = Reporter(workdir, step=0, total_steps=5, batch_size=8, sinks=['tensorboard'])
    reporter.tick()
    reporter.interval(5, MEANS)
    assert read_lines(workdir / 'metrics.jsonl') == []
    reporter.flush()
    assert [record['images_seen'] for record in read_lines(workdir / 'metrics.jsonl')] == [40]
    reporter.close()


class Hands:
    """A clock that the test turns."""

    def __init__(self, start=1000.0):
        self.now = start

    def __call__(self):
        return self.now


def clock_of(hands, step=0, **options):
    return RunClock(step, 100, clock=hands, wall=hands, **options)


def test_only_time_of_steps_is_productive():
    hands = Hands()
    clock = clock_of(hands)
    hands.now += 30                                 # compilation and the first batch
    clock.waited(25)
    assert clock.dispatched() == 30
    hands.now += 10                                 # steps 1 to 10: 10 s, 1 s of it waiting for data
    clock.waited(1)
    assert clock.dispatched() is None
    first = clock.interval(10)
    assert (first.steps, first.seconds, first.waited, first.productive) == (10, 10, 1, 9)
    assert first.eta == 90 and first.goodput == pytest.approx(9 / 40)
    hands.now += 25                                 # steps 11 to 20, with 5 s of saving between them
    clock.paused(5)
    second = clock.interval(20)
    assert (second.seconds, second.productive) == (20, 29)
    assert second.eta == 80 * 30 / 20 and second.goodput == pytest.approx(29 / 65)


def test_a_step_done_twice_counts_once_and_the_time_between_two_calls_counts_as_lost():
    hands = Hands()
    clock = clock_of(hands)
    clock.dispatched()
    for step in (10, 20, 30):
        hands.now += 10
        kept = clock.interval(step)
        if step == 20:
            # the record of step 20 is the last that survives the crash
            saved = kept.productive
    assert kept.goodput == 1.0
    hands.now += 20                                 # dead for 20 s; then steps 21 to 30 again
    again = clock_of(hands, step=20, began=1000.0, productive=saved)
    again.dispatched()
    hands.now += 10
    done = again.interval(30)
    assert done.productive == 30 and done.goodput == pytest.approx(30 / 60)


def test_without_the_time_of_the_first_start_only_this_call_counts():
    hands = Hands()
    clock = clock_of(hands, productive=500.0)
    hands.now += 10
    clock.dispatched()
    hands.now += 10
    done = clock.interval(5)
    assert done.productive == 10 and done.goodput == 0.5


def test_a_clock_set_back_does_not_make_more_than_everything():
    hands = Hands()
    clock = clock_of(hands, began=2000.0, productive=7.0)
    clock.dispatched()
    hands.now += 1
    assert clock.interval(1).goodput == 1.0


def test_the_peak_is_that_of_all_devices_or_what_the_recipe_says(caplog):
    caplog.set_level(logging.INFO, 'lit_jax')
    v5e, cpu = SimpleNamespace(device_kind='TPU v5 lite'), SimpleNamespace(device_kind='cpu')
    assert peak_flops([v5e] * 16) == 16 * find_chip('TPU v5 lite').peak_flops
    assert peak_flops([cpu] * 4, 1.5) == 4 * 1.5e12
    assert caplog.text == ''
    assert peak_flops([cpu] * 4) is None and caplog.text == ''
    assert peak_flops([v5e, SimpleNamespace(device_kind='NPU 1')]) is None
    assert caplog.text.count("peak FLOP/s of 'NPU 1' unknown") == 1
    for wrong in (-1.0, float('nan')):
        with pytest.raises(UserError, match='log.peak_tflops must be 0'):
            peak_flops([v5e], wrong)


def test_memory_is_that_of_the_fullest_device_and_absent_where_nobody_counts_it():
    def device(peak):
        return SimpleNamespace(memory_stats=lambda: {'peak_bytes_in_use': peak * 2**30,
                                                     'bytes_limit': 16 * 2**30})

    def broken():
        raise jax.errors.JaxRuntimeError('UNIMPLEMENTED')

    assert hbm_peak([device(2), device(9), device(3)]) == (9, 16)
    assert hbm_peak([SimpleNamespace(memory_stats=broken)]) == (None, None)
    assert hbm_peak(jax.local_devices()) == (None, None)     # the CPUs of the tests


MEANS = {'loss/total': 0.02, 'loss/mse': 0.015, 'loss/vb': 0.005, 'grad/norm': 0.1}
TIMING = {'time/step_ms': 15.8, 'time/images_per_s': 8100.0, 'time/images_per_s_per_device': 8100.0,
          'data/wait_percent': 0.4, 'time/eta_s': 192.0, 'perf/goodput_percent': 93.42}


def test_a_run_writes_its_numbers_and_takes_up_its_goodput_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'lit_jax')
    options = {'total_steps': 30, 'batch_size': 8, 'sinks': [], 'flops_per_step': 2e9, 'peak_flops': 1e12,
               'device_count': 4}
    reporter = Reporter(tmp_path, step=0, **options)
    reporter.tick()
    reporter.interval(10, MEANS)
    reporter.interval(20, MEANS)
    reporter.flush()
    reporter.close()
    first, second = read_lines(tmp_path / 'metrics.jsonl')
    assert first['images_seen'] == 80 and first['loss/total'] == 0.02
    rate = second['time/images_per_s']
    assert second['time/images_per_s_per_device'] == pytest.approx(rate / 4)
    assert second['perf/model_flops_per_s'] == pytest.approx(2e9 * rate / 8)
    assert second['perf/mfu_percent'] == pytest.approx(100 * second['perf/model_flops_per_s'] / 1e12)
    assert second['time/step_ms'] == pytest.approx(1e3 * 8 / rate)
    assert 'perf/hbm_peak_gib' not in second        # a CPU has none
    assert 0 < first['time/productive_s'] < second['time/productive_s']
    assert 'compiling took' in caplog.text and 'step 20/30' in caplog.text
    reporter = Reporter(tmp_path, step=10, began=0.0, **options)
    reporter.tick()
    reporter.interval(20, MEANS)
    reporter.close()
    kept, redone = read_lines(tmp_path / 'metrics.jsonl')
    assert kept == first and redone['time/productive_s'] > first['time/productive_s']
    assert redone['perf/goodput_percent'] < 1e-3    # it began in 1970


def test_without_a_count_of_operations_or_a_peak_nothing_is_invented(tmp_path):
    for name, options in (('no_count', {'peak_flops': 1e12}), ('no_peak', {'flops_per_step': 1e9})):
        (tmp_path / name).mkdir()
        reporter = Reporter(tmp_path / name, step=0, total_steps=5, batch_size=8, sinks=[], **options)
        reporter.tick()
        reporter.interval(5, MEANS)
        reporter.close()
        (record,) = read_lines(tmp_path / name / 'metrics.jsonl')
        assert 'perf/mfu_percent' not in record
        assert ('perf/model_flops_per_s' in record) == (name == 'no_peak')


def test_the_line_has_what_a_person_looks_for():
    line = format_line(1500, 15000, 384_000, MEANS, TIMING)
    assert line == ('step 1,500/15,000  384,000 images  loss 0.0200 (mse 0.0150  vb 0.0050)  grad 0.100  '
                    '8,100 img/s  15.8 ms  data-wait 0.4 %  goodput 93.4 %  ETA 3m 12s')
    pod = {**TIMING, 'time/images_per_s_per_device': 31.64, 'perf/model_flops_per_s': 1.23e15,
           'perf/mfu_percent': 41.2, 'perf/hbm_peak_gib': 11.24, 'perf/hbm_limit_gib': 15.75}
    line = format_line(1500, 15000, 384_000, MEANS, pod)
    for part in ('8,100 img/s (31.6 a device)', '1.23 PFLOP/s', 'MFU 41.2 %', 'HBM 11.2 of 15.8 GiB'):
        assert part in line
    assert '\n' not in line


@pytest.mark.parametrize('flops, text',
                         [(3.2e5, '0.32 MFLOP/s'), (8.12e8, '812 MFLOP/s'), (2.34e10, '23.4 GFLOP/s'),
                          (1.23e15, '1.23 PFLOP/s')])
def test_speeds_read_like_speeds(flops, text):
    assert format_flops(flops) == text


@pytest.mark.parametrize('seconds, text', [(4.4, '4s'), (192, '3m 12s'), (11_520, '3h 12m')])
def test_durations_read_like_durations(seconds, text):
    assert format_seconds(seconds) == text
