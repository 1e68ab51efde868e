"""Background saves of several processes: when one cannot write its part, all learn it at once.

Orbax writes in a thread of each process; the threads then meet at a barrier, process 0 commits, and they meet
again. A thread that fails never reaches its barrier, and the others wait until Orbax's time limit (20
minutes). Here the error is kept, the thread goes to the barrier all the same, and all see who has failed by
small files in the unfinished directory: the only thing that all processes can write and read from a thread
(collectives belong to the thread that starts the train steps). The two barriers are known by parts of their
names in Orbax; should a later Orbax rename them, its time limit still holds."""
from collections.abc import Callable

import jax

from lit_jax.runtime.errors import UserError

_WRITTEN, _COMMITTED = 'async_write_complete', 'async_commit_complete'
_KEPT = (OSError, ValueError, RuntimeError)
_LIMIT_MS = 1200 * 1000


class PartMissing(UserError):
    """Another process could not write its part of a checkpoint; its own error says why."""


class SaveTogether:
    """State of the running save in one process. With a single process it does nothing."""

    def __init__(self, wait_for_all: Callable, find_unfinished: Callable):
        """wait_for_all(key=, timeout_ms=): barrier of any thread. find_unfinished(): the new directory."""
        self._wait_for_all, self._find_unfinished = wait_for_all, find_unfinished
        self._failure: BaseException | None = None
        self._commit_key = None

    def begin(self) -> None:
        """Forgets the previous save."""
        self._failure = self._commit_key = None

    def guard(self, handler):
        """An Orbax handler whose saves keep their errors for the barrier."""
        if jax.process_count() == 1:
            return handler
        save, finalize = handler.async_save, handler.finalize

        async def async_save(*args, **kwargs):
            try:
                return [_Kept(future, self) for future in await save(*args, **kwargs) or []]
            except _KEPT as error:
                self.keep(error)
                return []

        handler.async_save = async_save
        handler.finalize = lambda directory: self.commit(lambda: finalize(directory))
        return handler

    def keep(self, error: BaseException) -> None:
        self._failure = self._failure or error

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier. At the first of a save it raises on every process if a part is missing."""
        if jax.process_count() == 1:
            return
        if _WRITTEN not in key:
            self._wait_for_all(key=key, timeout_ms=timeout_ms)
            return
        self._commit_key = key.replace(_WRITTEN, _COMMITTED)
        missing = self._exchange(key, timeout_ms)
        if self._failure is not None:
            raise self._failure
        if missing:
            raise PartMissing(f'process {missing[0]} could not write its part of the checkpoint (see its '
                              f'log); nothing half-written was kept.')

    def _exchange(self, key: str, timeout_ms: int) -> list[int]:
        """The processes that have failed."""
        folder = self._find_unfinished()
        marks = [folder / f'.part.{i}.written' for i in range(jax.process_count())]
        mine = marks[jax.process_index()]
        try:
            if self._failure is None:
                mine.write_text('')
        except OSError as error:
            self.keep(error)
        self._wait_for_all(key=key, timeout_ms=timeout_ms)
        missing = [i for i, mark in enumerate(marks) if not mark.exists()]
        self._wait_for_all(key=key + '.looked', timeout_ms=timeout_ms)  # now the marks may go
        if not missing:
            mine.unlink()
            self._wait_for_all(key=key + '.cleared', timeout_ms=timeout_ms)
        return missing

    def commit(self, act: Callable) -> None:
        """`act()` in process 0 between the barriers; if it fails, the others still pass the second one, and
        learn of it when they wait for the save in the foreground (`peers.together`)."""
        try:
            act()
        except _KEPT:
            if self._commit_key is not None:
                self._wait_for_all(key=self._commit_key, timeout_ms=_LIMIT_MS)
            raise


class _Kept:
    """An Orbax future whose error goes to the SaveTogether in place of the caller."""

    def __init__(self, future, save: SaveTogether):
        self._future, self._save = future, save

    def result(self, timeout: int | None = None):
        try:
            return self._future.result(timeout=timeout)
        except _KEPT as error:
            self._save.keep(error)
            return None
