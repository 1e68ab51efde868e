"""Logs and metrics: a line per interval, `metrics.jsonl`, a progress bar on a terminal, TensorBoard and W&B.

`loss/...` and `grad/...` are means over the interval and the same in every run of a recipe; `time/...`,
`data/...` and `perf/...` depend on the machine."""
import contextlib
import logging
import math
import re
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from lit_jax.runtime import progress
from lit_jax.runtime.paths import as_path
from lit_jax.runtime.progress import format_seconds
from lit_jax.training.metrics_log import MetricsLog
from lit_jax.training.metrics_log import read_lines as read_lines
from lit_jax.training.sinks import close_all, open_sink, show_all, write_all
from lit_jax.training.speed import Interval, RunClock, hbm_peak

LOG = logging.getLogger('lit_jax')


class Diverged(RuntimeError):
    """A loss or gradient is NaN or infinite. The message names step, term and leaf."""


class StepMetrics:
    """The metrics of the steps since the last log line.
    They stay on the device until `fetch`, so the loop never waits for a step between log points. `pending` is
    JSON-able and part of every checkpoint: a run resumed in the middle of an interval logs the same means."""

    def __init__(self, leaf_names: list[str], pending: list[dict] | None = None):
        self.leaf_names = leaf_names         # of the gradient
        self._on_device: list[tuple[int, dict]] = []
        self.pending: list[dict] = list(pending or [])

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps the metrics of `step` (number of updates, with this one) without waiting for them."""
        self._on_device.append((step, metrics))

    def fetch(self) -> None:
        """Fetches the metrics of the steps so far; raises Diverged at the first bad one."""
        found = jax.device_get([metrics for _, metrics in self._on_device])
        for (step, _), metrics in zip(self._on_device, found, strict=True):
            self._check(step, metrics)
            self.pending.append({name: jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), value)
                                 for name, value in metrics.items() if name != 'grad/bad_leaf'})
        self._on_device.clear()

    def _check(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        bad_terms = [name for name, value in metrics.items() if name.startswith('loss/')
                     and not np.isfinite(value)]
        leaf = int(metrics['grad/bad_leaf'])
        if bad_terms or leaf >= 0:
            terms = ', '.join(f'{name} = {float(metrics[name])}' for name in bad_terms)
            where = 'the gradients are finite' if leaf < 0 else \
                f'first non-finite gradient: {self.leaf_names[leaf]}'
            raise Diverged(f'step {step}: {terms or "the losses are finite"}; {where}')

    def summarise(self) -> dict[str, float]:
        """Means over the interval, which ends; of quarters over their examples."""
        record = {}
        for name in self.pending[0] if self.pending else ():
            values = [entry[name] for entry in self.pending]
            if name.startswith('quarter/'):
                sums, counts = (np.sum([value[part] for value in values], axis=0) for part in (0, 1))
                for quarter in range(4):
                    mean = sums[quarter] / counts[quarter] if counts[quarter] else None
                    record[f'loss/{name.removeprefix("quarter/")}_q{quarter + 1}'] = mean
            else:
                record[name] = math.fsum(values) / len(values)
        self.pending.clear()
        return record


class Reporter:
    """Writes logs and metrics on process 0; other processes stay silent.

    step: steps done at the start of this call. sinks: names of `lit_jax.training.sinks.SINKS`.
    flops_per_step: FLOPs of a global step, by the model's own count; 0 omits FLOP/s. The next stage sets it.
    peak_flops: of all devices (`lit_jax.training.speed.peak_flops`); None omits MFU.
    device_count: of all processes. began: unix time of the first start of the run; None: this call.
    recipe: for dashboards that show it."""

    def __init__(self, workdir, *, step: int, total_steps: int, batch_size: int, sinks: list[str],
                 flops_per_step: float = 0.0, peak_flops: float | None = None, device_count: int = 1,
                 began: float | None = None, recipe: Mapping | None = None):
        self._active = jax.process_index() == 0
        workdir = as_path(workdir)
        self._total, self._batch, self._devices = total_steps, batch_size, device_count
        self.flops_per_step, self._peak = flops_per_step, peak_flops
        self._log = MetricsLog(workdir / 'metrics.jsonl', step) if self._active else None
        before = (self._log and self._log.last) or {}
        self._clock = RunClock(step, total_steps, began=began,
                               productive=before.get('time/productive_s', 0.0))
        self._sinks = {name: sink for name in sinks
                       if self._active and (sink := open_sink(name, workdir, recipe))}
        self._step, self._began, self._first = step, time.monotonic(), step
        self._open = contextlib.ExitStack()
        self._open.enter_context(progress.working(self._describe))
        self._bar = None
        if self._active and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit='step', dynamic_ncols=True)
            self._open.enter_context(progress.unwatched())

    def waited(self, seconds: float) -> None:
        self._clock.waited(seconds)

    def paused(self, seconds: float) -> None:
        self._clock.paused(seconds)

    def tick(self) -> None:
        startup = self._clock.dispatched()
        self._step += 1
        if startup is not None:
            self._began, self._first = time.monotonic(), self._step
        if startup is not None and self._active:
            self._say(f'first step dispatched; loading the first batch and compiling took '
                      f'{format_seconds(startup)}')
        if self._bar is not None:
            self._bar.update(1)

    def interval(self, step: int, means: Mapping[str, float]) -> None:
        """Writes the line of the interval that ended at `step`; its steps are done."""
        timing = self._timing(self._clock.interval(step))
        if self._active:
            writing = time.perf_counter()
            images = step * self._batch
            self._log.write({'step': step, 'images_seen': images, **means, **timing})
            scalars = {name: value for name, value in {**means, **timing}.items() if value is not None}
            write_all(self._sinks, step, scalars)
            self._say(format_line(step, self._total, images, means, timing))
            self.paused(time.perf_counter() - writing)

    def scored(self, step: int, scores: Mapping[str, float], seconds: float) -> None:
        """Writes the record and the line of an evaluation after `step`: {'eval/fid_cfg1.5': ...}."""
        if self._active:
            self._log.write({'step': step, **scores, 'time/eval_s': seconds,
                             'time/productive_s': self._clock.productive})
            write_all(self._sinks, step, scores)
            values = '  '.join(f'{name.removeprefix("eval/")} {value:.4g}' for name, value in scores.items())
            self._say(f'step {step:,}/{self._total:,}  scores: {values}  ({format_seconds(seconds)})')

    def drawn(self, step: int, image_HWC: np.ndarray) -> None:
        """Shows a grid of samples, uint8, on the dashboards."""
        if self._active:
            show_all(self._sinks, step, image_HWC)

    def owes_scores(self, step: int) -> bool:
        """Whether the log that this call found was interrupted before the evaluation of `step`."""
        last = (self._log and self._log.last) or {}
        return last.get('step') != step or not any(name.startswith('eval/') for name in last)

    def _describe(self) -> str:
        """How far the run is, between two lines of the log. Steps are counted when they are dispatched."""
        done, seconds = self._step - self._first, time.monotonic() - self._began
        left = f', about {format_seconds(seconds / done * (self._total - self._step))} left' if done else ''
        return f'training: step {self._step:,}/{self._total:,}{left}'

    def _timing(self, done: Interval) -> dict[str, float]:
        """{name: value} of an interval, without values that this machine or recipe does not have."""
        rate = self._batch * done.steps / done.seconds
        timing = {'time/step_ms': 1e3 * done.seconds / done.steps, 'time/images_per_s': rate,
                  'time/images_per_s_per_device': rate / self._devices,
                  'data/wait_percent': 100 * done.waited / done.seconds, 'time/eta_s': done.eta,
                  'time/productive_s': done.productive, 'perf/goodput_percent': 100 * done.goodput}
        if self.flops_per_step:
            timing['perf/model_flops_per_s'] = self.flops_per_step * done.steps / done.seconds
            if self._peak:
                timing['perf/mfu_percent'] = 100 * timing['perf/model_flops_per_s'] / self._peak
        peak, limit = hbm_peak(jax.local_devices())
        memory = {'perf/hbm_peak_gib': peak, 'perf/hbm_limit_gib': limit}
        return timing | {name: value for name, value in memory.items() if value is not None}

    def _say(self, line: str) -> None:
        if self._bar is None:
            LOG.info(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def flush(self) -> None:
        """Writes the records that are still in memory. The loop calls it before each save."""
        if self._log is not None:
            writing = time.perf_counter()
            self._log.flush()
            self.paused(time.perf_counter() - writing)

    def close(self) -> None:
        self._open.close()
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
        close_all(self._sinks)


def format_line(step: int, total: int, images: int, means: Mapping[str, float],
                timing: Mapping[str, float]) -> str:
    """The log line, without what `timing` does not have (here broken in three):

    `step 1,500/15,000  384,000 images  loss 0.0213 (mse 0.0202  vb 0.0011)  grad 0.120
    8,100 img/s (506 a device)  15.8 ms  data-wait 0.4 %  1.23 PFLOP/s  MFU 41.2 %
    HBM 11.2 of 15.7 GiB  goodput 93.4 %  ETA 3m 12s`"""
    distilled = sorted(name for name in _terms(means) if name.startswith('distill_'))
    usual = 'mse', 'vb', 'cosine', *distilled, 'align'
    names = dict.fromkeys([*(name for name in usual if f'loss/{name}' in means), *_terms(means)])
    terms = '  '.join(f'{name} {means[f"loss/{name}"]:.4f}' for name in names)
    rate, each = timing['time/images_per_s'], timing['time/images_per_s_per_device']
    parts = [f'step {step:,}/{total:,}', f'{images:,} images', f'loss {means["loss/total"]:.4f} ({terms})',
             f'grad {means["grad/norm"]:.3f}',
             f'{_short(rate)} img/s' + (f' ({_short(each)} a device)' if each != rate else ''),
             f'{timing["time/step_ms"]:,.1f} ms', f'data-wait {timing["data/wait_percent"]:.1f} %']
    if 'perf/model_flops_per_s' in timing:
        parts.append(format_flops(timing['perf/model_flops_per_s']))
    if 'perf/mfu_percent' in timing:
        parts.append(f'MFU {timing["perf/mfu_percent"]:.1f} %')
    if 'perf/hbm_peak_gib' in timing:
        limit = timing.get('perf/hbm_limit_gib')
        parts.append(f'HBM {timing["perf/hbm_peak_gib"]:.1f}' + (f' of {limit:.1f} GiB' if limit else ' GiB'))
    return '  '.join([*parts, f'goodput {timing["perf/goodput_percent"]:.1f} %',
                      f'ETA {format_seconds(timing["time/eta_s"])}'])


def _terms(means: Mapping[str, float]) -> list[str]:
    """Names of all terms of the loss, without their quarters."""
    names = [name.removeprefix('loss/') for name in means if name.startswith('loss/')]
    return [name for name in names if name != 'total' and not re.search(r'_q[1-4]$', name)]


def _short(rate: float) -> str:
    return f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'


def format_flops(flops: float) -> str:
    """'812 MFLOP/s', '23.4 GFLOP/s', '1.23 PFLOP/s'."""
    power = min(max(int(math.log10(max(flops, 1)) // 3), 2), 6)
    return f'{flops / 1000**power:.3g} {"MGTPE"[power - 2]}FLOP/s'
