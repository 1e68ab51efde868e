"""What a run says: one line an interval, `metrics.jsonl`, a progress bar on a terminal, optional TensorBoard and W&B."""
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

LOG = logging.getLogger('lit_jax')


class Diverged(RuntimeError):
    """A loss or gradient stopped being a number. The message names step, term and leaf."""


class StepMetrics:
    """The metrics of the steps since the last log line.

    They stay on the device until `fetch`, so that the loop never waits for a step between log points. `pending` is
    JSON-able and goes into every checkpoint: a run resumed in the middle of an interval logs the same means.
    """

    def __init__(self, leaf_names: list[str], pending: list[dict] | None = None):
        self._leaf_names = leaf_names
        self._on_device: list[tuple[int, dict]] = []
        self.pending: list[dict] = list(pending or [])

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps the metrics of `step` (updates done, this one included) without waiting for them."""
        self._on_device.append((step, metrics))

    def fetch(self) -> None:
        """Waits for the steps so far, moves their metrics to the host, and raises Diverged at the first bad one."""
        steps = [step for step, _ in self._on_device]
        for step, metrics in zip(steps, jax.device_get([metrics for _, metrics in self._on_device]), strict=True):
            self._check(step, metrics)
            self.pending.append({name: jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), value)
                                 for name, value in metrics.items() if name != 'grad/bad_leaf'})
        self._on_device.clear()

    def _check(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        bad_terms = [name for name, value in metrics.items() if name.startswith('loss/') and not np.isfinite(value)]
        leaf = int(metrics['grad/bad_leaf'])
        if bad_terms or leaf >= 0:
            terms = ', '.join(f'{name} = {float(metrics[name])}' for name in bad_terms) or 'the losses are finite'
            where = f'first non-finite gradient: {self._leaf_names[leaf]}' if leaf >= 0 else 'the gradients are finite'
            raise Diverged(f'step {step}: {terms}; {where}')

    def summarise(self) -> dict[str, float]:
        """Means over the interval, then forgets it. Quarters are means over the examples that fell into them."""
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


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its step. Opening at `step` drops what lies after it."""

    def __init__(self, path: Path, step: int):
        self.path = Path(path)
        kept = [line for line in read_lines(self.path) if line['step'] <= step]
        temporary = self.path.with_suffix('.jsonl.part')
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open('a')

    def write(self, record: Mapping) -> None:
        self._file.write(json.dumps(record) + '\n')
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed run left unfinished is left out."""
    if not Path(path).exists():
        return []
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            LOG.warning('%s: dropped an unfinished line', path)
    return records


class TensorBoardSink:
    """Scalars for TensorBoard, through tensorboardX (no TensorFlow)."""

    def __init__(self, workdir: Path):
        from tensorboardX import SummaryWriter
        self._writer = SummaryWriter(str(workdir / 'tensorboard'))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Scalars for Weights & Biases; the run is named after the workdir and resumes with it."""

    def __init__(self, workdir: Path):
        import wandb
        identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(project='lit_jax', name=workdir.name, id=identity, dir=str(workdir), resume='allow')

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


SINKS = {'tensorboard': TensorBoardSink, 'wandb': WandbSink}


class Reporter:
    """Everything that is written at a log point, on process 0 only; the other processes stay silent."""

    def __init__(self, workdir: Path, *, step: int, total_steps: int, batch_size: int, sinks: list[str]):
        self._active = jax.process_index() == 0
        self._total, self._batch = total_steps, batch_size
        self._log = MetricsLog(workdir / 'metrics.jsonl', step) if self._active else None
        self._sinks = [sink for name in sinks if self._active and (sink := open_sink(name, workdir))]
        terminal = self._active and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit='step', dynamic_ncols=True) if terminal else None
        self._start = self._interval_start = time.perf_counter()
        self._start_step = self._interval_step = step
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """Counts time that the loop spent waiting for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Counts time spent on other things than steps (sampling, saving), left out of the speed and the ETA."""
        self._paused += seconds
        self._start += seconds

    def tick(self) -> None:
        """One step was dispatched."""
        if self._bar is not None:
            self._bar.update(1)

    def interval(self, step: int, means: Mapping[str, float]) -> None:
        """Writes the line of an interval that ended at `step`."""
        now = time.perf_counter()
        seconds = max(now - self._interval_start - self._paused, 1e-9)
        steps = max(step - self._interval_step, 1)
        eta = (now - self._start) / max(step - self._start_step, 1) * (self._total - step)
        timing = {'time/step_ms': 1e3 * seconds / steps, 'time/images_per_s': self._batch * steps / seconds,
                  'data/wait_percent': 100 * self._waited / seconds, 'time/eta_s': eta}
        if self._active:
            self._log.write({'step': step, 'images_seen': step * self._batch, **means, **timing})
            scalars = {name: value for name, value in {**means, **timing}.items() if value is not None}
            for sink in self._sinks:
                sink.write(step, scalars)
            self._say(format_line(step, self._total, means, timing))
        self._interval_start, self._interval_step, self._waited, self._paused = now, step, 0.0, 0.0

    def _say(self, line: str) -> None:
        if self._bar is None:
            LOG.info(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
        for sink in self._sinks:
            sink.close()


def open_sink(name: str, workdir: Path):
    """A sink of SINKS, or None with a warning: a missing dashboard must not stop a run."""
    try:
        return SINKS[name](workdir)
    except (ImportError, OSError, RuntimeError) as error:
        LOG.warning('%s is off: %s. The run goes on; metrics.jsonl has everything.', name, error)
        return None


def format_line(step: int, total: int, means: Mapping[str, float], timing: Mapping[str, float]) -> str:
    """`step 1,500/15,000  loss 0.0213 = mse 0.0202 + vb 0.0011  grad 0.12  8,100 img/s  15.8 ms  data-wait 0.4 %  ETA 3m 12s`"""
    terms = [(name, means[f'loss/{name}']) for name in ('mse', 'vb', 'distill_noise', 'distill_variance')
             if f'loss/{name}' in means]
    parts = '  '.join(f'{name} {value:.4f}' for name, value in terms)
    return (f'step {step:,}/{total:,}  loss {means["loss/total"]:.4f}  ({parts})  grad {means["grad/norm"]:.3f}  '
            f'{timing["time/images_per_s"]:,.0f} img/s  {timing["time/step_ms"]:.1f} ms  '
            f'data-wait {timing["data/wait_percent"]:.1f} %  ETA {format_seconds(timing["time/eta_s"])}')


def format_seconds(seconds: float) -> str:
    """'3h 12m', '3m 12s' or '12s'."""
    seconds = int(round(seconds))
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f'{hours}h {minutes:02d}m' if hours else f'{minutes}m {rest:02d}s' if minutes else f'{rest}s'
