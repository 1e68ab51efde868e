"""Memory of sampling: an estimate in advance, the peak of each phase, and advice when it runs out."""
import contextlib
import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from lit_jax.runtime.errors import UserError, human_bytes, reason_of
from lit_jax.runtime.json_file import split_lines
from lit_jax.runtime.progress import format_seconds

LOG = logging.getLogger('lit_jax')
_STATUS, _CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')
SAMPLE_SECONDS = 0.05
DRAW_LESS = ('Lower one of: --low_memory (one network in memory at a time), --text_dtype int8, '
             '--dtype bfloat16, --group 1, --tile 32 (decoding), a smaller --size')


def temporary_bytes(compiled) -> int:
    """Bytes of the results and temporaries of a compiled program, as counted by the compiler."""
    stats = compiled.memory_analysis()
    return 0 if stats is None else (stats.temp_size_in_bytes + stats.output_size_in_bytes
                                    - stats.alias_size_in_bytes)


@dataclass
class Phase:
    """Seconds of a phase and its highest memory, of the process and the devices (0: unknown)."""
    name: str
    weights: int = 0
    seconds: float = 0.0
    process: int = 0
    device: int = 0

    @property
    def peak(self) -> int:
        return max(self.process, self.device)

    def describe(self) -> str:
        peaks = (('of the process', self.process), ('on the device', self.device))
        where = [f'{human_bytes(peak)} {of}' for of, peak in peaks if peak]
        return (f'{self.name}: weights {human_bytes(self.weights)}, peak '
                f'{" and ".join(where) or "not known"}, {self.seconds:.1f} s')


@dataclass
class Meter:
    """Peaks and total seconds of phases by name. between: the peak outside of them."""
    phases: dict[str, Phase] = field(default_factory=dict)
    between: int = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measures the block; set `weights` inside it. The first phase of each name is logged."""
        first = name not in self.phases
        phase = self.phases.setdefault(name, Phase(name))
        self.between = max(self.between, _status('VmHWM'))
        watch, began = _Watch(), time.perf_counter()
        try:
            yield phase
        finally:
            phase.process = max(phase.process, watch.stop())
            phase.device = max(phase.device, device_peak())
            phase.seconds += time.perf_counter() - began
        if first:
            LOG.info('%s', phase.describe())

    def summary(self) -> str:
        """The highest peak, its phase, and the seconds of all phases."""
        if not self.phases:
            return 'nothing was measured'
        outside = Phase('preparation', process=max(self.between, _status('VmHWM')))
        highest = max([*self.phases.values(), outside], key=lambda phase: phase.peak)
        parts = ', '.join(f'{phase.name} {format_seconds(phase.seconds)}' for phase in self.phases.values())
        return f'peak memory {human_bytes(highest.peak)} (in {highest.name}); {parts}'


class _Watch:
    """The highest resident memory of this process until `stop`; 0 where the system does not report it.

    Linux keeps it, and resets it on request; where that is not allowed, a thread polls."""

    def __init__(self):
        self._highest, self._done, self._thread = _status('VmRSS'), threading.Event(), None
        try:
            _CLEAR.write_text('5')
        except OSError:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def stop(self) -> int:
        self._done.set()
        if self._thread is None:
            return _status('VmHWM')
        self._thread.join()
        return max(self._highest, _status('VmRSS'))

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._highest = max(self._highest, _status('VmRSS'))


def _status(name: str) -> int:
    try:
        line = next(line for line in split_lines(_STATUS.read_text()) if line.startswith(name + ':'))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def device_peak() -> int:
    """The highest memory used so far on one local device; 0 where it is not counted (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found.get('peak_bytes_in_use', 0) for found in stats), default=0)


def give_back() -> None:
    """Returns freed memory to the system; glibc would keep it for later."""
    gc.collect()
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def describe_estimate(estimates: Sequence[tuple[str, int, int]], low_memory: bool) -> str:
    """One line for [(phase, bytes of weights, of temporaries)]. low_memory: one phase in memory at a time."""
    parts = ', '.join(f'{name} {human_bytes(weights)} + {human_bytes(extra)}'
                      for name, weights, extra in estimates)
    if low_memory:
        total = max(weights + extra for _, weights, extra in estimates)
    else:
        total = sum(weights for _, weights, _ in estimates) + max(extra for *_, extra in estimates)
    return (f'memory expected, weights + temporaries: {parts}; at most {human_bytes(total)} at once, and '
            'about 0.5 GB for the program')


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device (by XLA's message) or the process is out of memory."""
    return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


@contextlib.contextmanager
def explain_out_of_memory(doing: str, advice: str = DRAW_LESS):
    """Turns an out-of-memory error into a UserError that says what to change."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
        said = f' ({reason_of(error)})' if str(error).strip() else ''
        raise UserError(f'out of memory while {doing}{said}. {advice}') from error
