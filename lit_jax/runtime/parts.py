"""Long work in parts, each whole or absent, so that an interrupted job resumes with the missing ones."""
import logging
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lit_jax.runtime import cluster, peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.npz_file import npy_header
from lit_jax.runtime.paths import as_path, explain_unwritable, files_under, write_bytes_atomic
from lit_jax.runtime.progress import Progress

LOG = logging.getLogger('lit_jax')


class Parts:
    """`count` rows in parts of `size`."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    @property
    def parts(self) -> range:
        return range(math.ceil(self.count / self.size))

    def span(self, part: int) -> range:
        """Row numbers of a part; the last part may be shorter."""
        return range(part * self.size, min((part + 1) * self.size, self.count))


class PartFolder(Parts):
    """`count` rows of one shape and dtype in `folder`, `size` rows a file: 000000128-000000256.npy."""

    def __init__(self, folder, count: int, size: int, row: tuple[int, ...], dtype):
        super().__init__(count, size)
        self.folder, self.row, self.dtype = as_path(folder), tuple(row), np.dtype(dtype)

    def missing(self) -> list[int]:
        """Parts whose file is missing or has the wrong size."""
        sizes = files_under(self.folder)
        parts = [part for part in self.parts if sizes.get(self._name(part)) != self._file_size(part)]
        if broken := [self._name(part) for part in parts if self._name(part) in sizes]:
            LOG.warning('%s: %s incomplete, will be made again', self.folder, ', '.join(broken))
        return parts

    def write(self, part: int, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self.dtype)
        shape = (len(self.span(part)), *self.row)
        if rows.shape != shape:
            raise ValueError(f'part {part} has shape {rows.shape}, expected {shape}')
        with explain_unwritable(self.folder, rows.nbytes):
            write_bytes_atomic(self.folder / self._name(part),
                               npy_header(rows.shape, self.dtype) + rows.tobytes())

    def open(self, part: int):
        """The file of a part, positioned after its header."""
        file = (self.folder / self._name(part)).open('rb')
        file.read(self._header_size(part))
        return file

    def read(self) -> np.ndarray:
        rows = np.empty((self.count, *self.row), self.dtype)
        for part in self.parts:
            with self.open(part) as file:
                rows[self.span(part).start:self.span(part).stop] = np.frombuffer(
                    file.read(), self.dtype).reshape(-1, *self.row)
        return rows

    def bytes(self, rows: int) -> int:
        return rows * math.prod(self.row) * self.dtype.itemsize

    def _header_size(self, part: int) -> int:
        return len(npy_header((len(self.span(part)), *self.row), self.dtype))

    def _file_size(self, part: int) -> int:
        return self._header_size(part) + self.bytes(len(self.span(part)))

    def _name(self, part: int) -> str:
        span = self.span(part)
        return f'{span.start:09d}-{span.stop:09d}.npy'


def make_missing(store, make: Callable[[list[int]], Iterator], unit: str, seconds: float = 10) -> int:
    """Makes the missing parts of a store, divided among all processes; returns their number of rows.

    Args:
        store: Parts with `out` and `missing()`.
        make: takes the part numbers of this process and returns an iterator that makes one per step. All
            processes step together, so that an error in one is raised in all.
        unit, seconds: of the logged progress.

    Raises UserError where finished parts cannot be seen by process 0."""
    missing, processes = peers.from_lead(store.missing), jax.process_count()
    rows = sum(len(store.span(part)) for part in missing)
    made = make(missing[jax.process_index()::processes])
    with (cluster.peers_watched(lambda: 'finished parts are kept'),
          Progress(store.count, unit, done=store.count - rows, seconds=seconds) as progress):
        for start in range(0, len(missing), processes):
            peers.together(lambda: next(made, None))
            progress.add(sum(len(store.span(part)) for part in missing[start:start + processes]))
        peers.together(lambda: next(made, None))     # the code after the last part
        peers.only_lead(lambda: _check_complete(store))
    return rows


def _check_complete(store) -> None:
    if lost := store.missing():
        raise UserError(f'{len(lost)} parts of {store.out} were made but are missing: all processes must see '
                        'the same folder. Give an --out on a shared disk or in a bucket (gs://...)')
