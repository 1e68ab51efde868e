"""Long work in parts, each whole or absent, so that an interrupted job resumes with the missing ones."""
import collections
import logging
import math
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lit_jax.runtime import claim, cluster, peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.npz_file import npy_header
from lit_jax.runtime.paths import (
    as_path,
    explain_unreadable,
    explain_unwritable,
    files_under,
    is_remote,
    write_bytes_atomic,
)
from lit_jax.runtime.progress import Progress

LOG = logging.getLogger('lit_jax')
_SUM = 16           # bytes of a checksum, see `_sum`
_BLOCK = 1 << 20


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
    """`count` rows of one shape and dtype in `folder`, `size` rows a file: 000000128-000000256.npy.

    After its rows a file has the CRC-32 of its name and of what stands before. Files of earlier versions have
    none, and are taken for whole by their size."""

    def __init__(self, folder, count: int, size: int, row: tuple[int, ...], dtype):
        super().__init__(count, size)
        self.folder, self.row, self.dtype = as_path(folder), tuple(row), np.dtype(dtype)
        self._known: set[int] = set()     # parts that this process wrote, or whose checksums it compared
        self._said: set[str] = set()

    def missing(self) -> list[int]:
        """Parts whose file is missing or damaged; in a bucket, which keeps checksums itself, by size only."""
        sizes, remote = files_under(self.folder), is_remote(self.folder)
        parts, broken = [], []
        for part in self.parts:
            size, rows = sizes.get(self._name(part)), self._file_size(part)
            if size in (rows, rows + _SUM) and (remote or part in self._known or self._is_whole(part)):
                self._known.add(part)
                continue
            parts.append(part)
            if size is not None:
                broken.append(self._name(part))
        if set(broken) - self._said:
            self._said |= set(broken)
            LOG.warning('%s: %s incomplete or damaged, will be made again', self.folder, ', '.join(broken))
        return parts

    def write(self, part: int, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self.dtype)
        shape = (len(self.span(part)), *self.row)
        if rows.shape != shape:
            raise ValueError(f'part {part} has shape {rows.shape}, expected {shape}')
        with explain_unwritable(self.folder, rows.nbytes):
            data = npy_header(rows.shape, self.dtype) + rows.tobytes()
            crc = zlib.crc32(data, self._begin(part))
            write_bytes_atomic(self.folder / self._name(part), data + _sum(crc))
        self._known.add(part)

    def blocks(self, part: int) -> Iterator[bytes]:
        """The rows of a part, a piece at a time. UserError at the end if they are damaged."""
        path, left = self.folder / self._name(part), self.bytes(len(self.span(part)))
        with explain_unreadable(path), path.open('rb') as file:
            crc = zlib.crc32(file.read(self._header_size(part)), self._begin(part))
            while left and (block := file.read(min(left, _BLOCK))):
                crc, left = zlib.crc32(block, crc), left - len(block)
                yield block
            written = file.read(_SUM + 1)
        if left or written not in (b'', _sum(crc)):
            self._known.discard(part)
            raise UserError(f'{path} is damaged: its bytes are not those that were written. The same command '
                            f'again makes it again')

    def read(self) -> np.ndarray:
        """All rows. UserError if a part is damaged."""
        rows = np.empty((self.count, *self.row), self.dtype)
        for part in self.parts:
            rows[self.span(part).start:self.span(part).stop] = np.frombuffer(
                b''.join(self.blocks(part)), self.dtype).reshape(-1, *self.row)
        return rows

    def bytes(self, rows: int) -> int:
        return rows * math.prod(self.row) * self.dtype.itemsize

    def _is_whole(self, part: int) -> bool:
        try:
            collections.deque(self.blocks(part), maxlen=0)
        except UserError:
            return False
        return True

    def _begin(self, part: int) -> int:
        return zlib.crc32(self._name(part).encode())

    def _header_size(self, part: int) -> int:
        return len(npy_header((len(self.span(part)), *self.row), self.dtype))

    def _file_size(self, part: int) -> int:
        """Without the checksum."""
        return self._header_size(part) + self.bytes(len(self.span(part)))

    def _name(self, part: int) -> str:
        span = self.span(part)
        return f'{span.start:09d}-{span.stop:09d}.npy'


def _sum(crc: int) -> bytes:
    return b'\ncrc32 %08x\n' % crc


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

    def advance():
        claim.check()
        return next(made, None)

    with (cluster.peers_watched(lambda: 'finished parts are kept'),
          Progress(store.count, unit, done=store.count - rows, seconds=seconds) as progress):
        for start in range(0, len(missing), processes):
            peers.together(advance)
            progress.add(sum(len(store.span(part)) for part in missing[start:start + processes]))
        peers.together(lambda: next(made, None))     # the code after the last part
        peers.only_lead(lambda: _check_complete(store))
    return rows


def _check_complete(store) -> None:
    if lost := store.missing():
        raise UserError(f'{len(lost)} parts of {store.out} were made but are missing: all processes must see '
                        'the same folder. Give an --out on a shared disk or in a bucket (gs://...)')
