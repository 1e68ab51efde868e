"""Profiles chosen steps for xprof: `python train.py --config=... --workdir=... --profile=20-25`.

To view it: `pip install xprof`, then `tensorboard --logdir=WORKDIR/profile` (or `xprof --logdir=...`)."""
import contextlib
import logging
import re
import time
from collections.abc import Callable

import jax

from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.paths import as_path

LOG = logging.getLogger('lit_jax')
_WINDOW = re.compile(r'(?:steps? +)?(\d+)(?: *- *(\d+))?')
_PROFILER_ERRORS = (OSError, RuntimeError)     # a trace that runs already, a full disk: may not stop a run


def parse_window(text: str) -> tuple[int, int]:
    """(first, last) step, both traced, of '20-25', 'steps 20-25' or '20'; the first step of a run is 1."""
    match = _WINDOW.fullmatch(text.strip())
    if match is None:
        raise UserError(f'--profile={shown(text)} is not a range of steps; write --profile=20-25')
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise UserError(f'--profile={shown(text)}: steps count from 1 and the last may not come before the '
                        f'first')
    return first, last


class ProfileWindow:
    """Traces the steps of a window, each process by itself, into `folder` (usually WORKDIR/profile).

    The loop calls `before(step)` ahead of dispatching a step and `after(step, metrics)` once it is
    dispatched. Only the borders of the window wait for the device: earlier steps have ended when tracing
    starts, the last one when it stops. A run that resumes inside the window traces the rest of it.
    window: (first, last) step, or None. paused: called with the seconds that the profiler itself took."""

    def __init__(self, folder, window: tuple[int, int] | None, *,
                 paused: Callable[[float], None] = lambda seconds: None):
        self._folder, self._paused = as_path(folder), paused
        self._first, self._last = window or (1, 0)
        self._tracing, self._done, self._seen = False, window is None, False
        self._traced = 0                         # the last traced step
        self._before = None                      # metrics of the step before the window
        self._step = contextlib.ExitStack()      # names the step in the trace

    def before(self, step: int) -> None:
        """Starts the trace if `step` is the first of the window in this run."""
        if self._done:
            return
        if not self._seen and step > self._last:
            LOG.warning('--profile=%d-%d: this call starts at step %s, nothing is traced', self._first,
                        self._last, f'{step:,}')
            self._done = True
            return
        self._seen = True
        if not self._tracing and step >= self._first:
            jax.block_until_ready(self._before)
            self._before = None
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0      # tracing each Python call slows the host and swells the file
            self._tracing = self._call(jax.profiler.start_trace, str(self._folder), profiler_options=options)
            self._done = not self._tracing
        if self._tracing:
            self._step.enter_context(jax.profiler.StepTraceAnnotation('train', step_num=step))

    def after(self, step: int, metrics) -> None:
        """Stops the trace once the last step of the window has ended. metrics: of the step, on the device."""
        if self._done:
            return
        self._step.close()
        if step == self._first - 1:
            self._before = metrics
        if self._tracing:
            self._traced = step
            if step == self._last:
                jax.block_until_ready(metrics)
                self.close()

    def close(self) -> None:
        """Ends a running trace and keeps what it has; never waits for the device."""
        if not self._done and not self._tracing and self._seen:
            LOG.warning('--profile=%d-%d: the run ended before the window, nothing was traced', self._first,
                        self._last)
        self._done = True
        self._step.close()
        if self._tracing:
            self._tracing = False
            if self._call(jax.profiler.stop_trace):
                LOG.info('profile of the steps up to %s is in %s; to view it: pip install xprof, then '
                         'tensorboard --logdir=%s', f'{self._traced:,}', self._folder, self._folder)

    def _call(self, function, *args, **kwargs) -> bool:
        began = time.perf_counter()
        try:
            function(*args, **kwargs)
        except _PROFILER_ERRORS as error:
            LOG.warning('the profiler is off: %s. The run continues.', error)
            return False
        finally:
            self._paused(time.perf_counter() - began)
        return True
