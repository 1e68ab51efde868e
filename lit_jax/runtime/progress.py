"""Progress and remaining time of long jobs: a bar on a terminal, log lines elsewhere."""
import logging
import sys
import time

from tqdm import tqdm

LOG = logging.getLogger('lit_jax')


def format_seconds(seconds: float) -> str:
    """'3h 12m', '3m 12s' or '12s'."""
    seconds = int(round(seconds))
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f'{hours}h {minutes:02d}m' if hours else f'{minutes}m {rest:02d}s' if minutes else f'{rest}s'


class Progress:
    """Counts to `total` things called `unit`, `done` of them earlier; logs every `seconds` and at the end."""

    def __init__(self, total: int, unit: str, *, done: int = 0, seconds: float = 30.0):
        self._total, self._unit, self._seconds = total, unit, seconds
        self._done, self._found, self._began = done, done, time.monotonic()
        self._logged = self._began
        if done:
            LOG.info('%s %s to go, %s already done', f'{total - done:,}', unit, f'{done:,}')
        shown = sys.stderr.isatty() and LOG.isEnabledFor(logging.INFO)
        self._bar = tqdm(total=total, initial=done, unit=f' {unit}', dynamic_ncols=True) if shown else None

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._logged >= self._seconds or self._done == self._total:
            self._logged = now
            rate = max(self._done - self._found, 1e-9) / max(now - self._began, 1e-9)
            LOG.info('%d of %d %s (%.0f %%), %.3g a second, %s left', self._done, self._total, self._unit,
                     100 * self._done / self._total, rate, format_seconds((self._total - self._done) / rate))
