"""Progress and remaining time of long jobs: a bar on a terminal, log lines elsewhere."""
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

LOG = logging.getLogger('lit_jax')
_work: list[Callable[[], str]] = []      # descriptions of what is being done, the innermost last
_bars: list[object] = []                 # bars on the terminal, and waits for a person
_heard = [time.monotonic()]              # when something was last said


def format_seconds(seconds: float) -> str:
    """'3h 12m', '3m 12s' or '12s'."""
    seconds = int(round(seconds))
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f'{hours}h {minutes:02d}m' if hours else f'{minutes}m {rest:02d}s' if minutes else f'{rest}s'


@contextlib.contextmanager
def working(describe: Callable[[], str] | str) -> Iterator[None]:
    """Names the work of this block, or describes how far it is, for the lines that `alive` says."""
    def said() -> str:
        return describe if isinstance(describe, str) else describe()

    _work.append(said)
    try:
        yield
    finally:
        _work.remove(said)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """A block that needs no lines: a bar shows how far it is, or it waits for a person."""
    mark = object()
    _bars.append(mark)
    try:
        yield
    finally:
        _bars.remove(mark)


def current() -> str:
    """The description of the innermost work; '' without one."""
    return _work[-1]() if _work else ''


def silent() -> bool:
    """Whether nobody waits for a line."""
    return bool(_bars)


def heard() -> None:
    """Notes that something was said."""
    _heard[0] = time.monotonic()


def seconds_quiet() -> float:
    return time.monotonic() - _heard[0]


class Progress:
    """Counts to `total` things called `unit`, `done` of them earlier; logs every `seconds` and at the end."""

    def __init__(self, total: int, unit: str, *, done: int = 0, seconds: float = 15.0):
        self._total, self._unit, self._seconds = total, unit, seconds
        self._done, self._found, self._began = done, done, time.monotonic()
        self._logged = self._began
        if done:
            LOG.info('%s %s to go, %s already done', f'{total - done:,}', unit, f'{done:,}')
        self._open, self._bar = contextlib.ExitStack(), None

    def __enter__(self) -> 'Progress':
        self._open.enter_context(working(self.describe))
        shown = sys.stderr.isatty() and LOG.isEnabledFor(logging.INFO)
        self._bar = self._open.enter_context(
            tqdm(total=self._total, initial=self._done, unit=f' {self._unit}', dynamic_ncols=True)
        ) if shown else None
        if shown:
            self._open.enter_context(unwatched())
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._logged >= self._seconds or self._done == self._total:
            self._logged = now
            LOG.info('%s', self.describe())

    def describe(self) -> str:
        """'120 of 500 images (24 %), 3.1 a second, 2m 03s left'."""
        share = 100 * self._done / self._total if self._total else 100.0
        text = f'{self._done} of {self._total} {self._unit} ({share:.0f} %)'
        rate = (self._done - self._found) / max(time.monotonic() - self._began, 1e-9)
        if self._done == self._found:
            return text
        return f'{text}, {rate:.3g} a second, {format_seconds((self._total - self._done) / rate)} left'
