"""Throughput of a run, peak FLOP/s and memory of its devices, and goodput.

Goodput is the time spent on steps that were kept, divided by the wall time since the first start of the run.
A step counts once: steps lost in a crash do not, their repetition does. Not productive: time between two
calls (queueing, restarting), startup (imports, restore, first batch, compilation until the first step is
dispatched), saving, sampling, writing the log, waiting for data. Steps between the last log line and the
checkpoint of a stopped run do not count either: a lower bound, short by at most a log interval per restart.
"""
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from lit_jax.runtime.chips import find_chip
from lit_jax.runtime.errors import UserError

LOG = logging.getLogger('lit_jax')


def peak_flops(devices: Sequence[jax.Device], override_tflops: float = 0.0) -> float | None:
    """FLOP/s of all `devices` together (a multiply-accumulate is two); None if unknown.
    override_tflops: TFLOP/s of one device; 0: from the table of chips (dense bfloat16)."""
    if override_tflops < 0 or not math.isfinite(override_tflops):
        raise UserError(f'log.peak_tflops must be 0 (take the table) or the TFLOP/s of one device, got '
                        f'{override_tflops}')
    if override_tflops:
        return override_tflops * 1e12 * len(devices)
    chips = {device.device_kind: find_chip(device.device_kind) for device in devices}
    unknown = sorted(kind for kind, chip in chips.items() if chip is None)
    if unknown:
        if jax.process_index() == 0 and unknown != ['cpu']:      # nobody asks a CPU for its MFU
            LOG.info('peak FLOP/s of %s unknown, so no MFU is shown; set --config.log.peak_tflops=N (of one '
                     'device) to see it', ', '.join(repr(kind) for kind in unknown))
        return None
    return sum(chips[device.device_kind].peak_flops for device in devices)


def hbm_peak(devices: Sequence[jax.Device]) -> tuple[float | None, float | None]:
    """(peak in use, limit) of the fullest device's memory, GiB, by the allocator; None if unknown (a CPU)."""
    fullest = {}
    for device in devices:
        try:
            stats = device.memory_stats() or {}
        except jax.errors.JaxRuntimeError:     # a plugin that has no such call
            continue
        fullest = max(fullest, stats, key=lambda stats: stats.get('peak_bytes_in_use', -1))
    sizes = fullest.get('peak_bytes_in_use'), fullest.get('bytes_limit')
    return tuple(None if size is None else size / 2**30 for size in sizes)


@dataclass(frozen=True)
class Interval:
    """The time between two log lines."""
    steps: int           # optimizer updates
    seconds: float       # their wall time, without pauses, with waiting for data
    waited: float        # the part of it spent waiting for data
    eta: float           # seconds for the remaining steps at the mean pace of this call, without pauses
    productive: float    # seconds of kept steps since the run began, over all restarts, without waiting
    goodput: float       # its share of the wall time since the run began, 0 to 1


class RunClock:
    """Sorts wall time into steps, waiting for data, pauses and startup. Never asks the device.

    step: steps done at the start of this call. total: steps of the whole run. began: unix time of the first
    start of the run; None: now, ignoring earlier calls. productive: seconds of kept steps since then, over
    all restarts, up to the last interval. clock, wall: monotonic seconds, and unix seconds."""

    def __init__(self, step: int, total: int, *, began: float | None = None, productive: float = 0.0,
                 clock: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time):
        self._clock, self._wall = clock, wall
        self._began, self.productive = (wall(), 0.0) if began is None else (began, productive)
        self._total = total
        self._first_step = self._interval_step = step
        self._created = self._start = self._interval_start = clock()
        self._waited = self._paused = 0.0
        self._running = False

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Counts time spent outside steps: saving, sampling, writing the log."""
        self._paused += seconds
        self._start += seconds

    def dispatched(self) -> float | None:
        """One step was dispatched. Returns the seconds of startup at the first one, then None."""
        if self._running:
            return None
        self._running = True
        self._start = self._interval_start = self._clock()
        self._waited = self._paused = 0.0
        return self._start - self._created

    def interval(self, step: int) -> Interval:
        """Closes the interval that ends with `step`."""
        now = self._clock()
        seconds = max(now - self._interval_start - self._paused, 1e-9)
        waited = min(self._waited, seconds)
        self.productive += seconds - waited
        pace = (now - self._start) / max(step - self._first_step, 1)
        wall = max(self._wall() - self._began, self.productive, 1e-9)     # the clock may be set back
        done = Interval(max(step - self._interval_step, 1), seconds, waited, pace * (self._total - step),
                        self.productive, goodput=self.productive / wall)
        self._interval_start, self._interval_step, self._waited, self._paused = now, step, 0.0, 0.0
        return done
