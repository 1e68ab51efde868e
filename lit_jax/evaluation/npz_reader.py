"""Reads arrays of an .npz file block by block, and refuses pickled objects.

An .npz is a zip file of .npy files, stored or deflated. Image sets take 10 to 40 GB, so the header of an
array is read first, then its rows in the order of the file.
"""
import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, explain_unreachable

_SKIP = 1 << 24
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)     # zipfile's, zlib's and numpy's


@dataclass(frozen=True)
class Header:
    """The header of an .npy file. `size`: bytes of the header itself."""
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    size: int


class Npz:
    """An open .npz file, a context manager; `names`: its arrays. UserError if it is not a whole .npz."""

    def __init__(self, path):
        self.path = as_path(path)
        with explain_unreachable(self.path):
            if not self.path.is_file():
                what = 'is a folder' if self.path.is_dir() else 'does not exist'
                raise UserError(f'{self.path} {what}; expected an .npz file')
            self._file = self.path.open('rb')
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _DAMAGE as error:
            self._file.close()
            raise UserError(f'{self.path} is not a whole .npz file ({error}): it is something else, or was '
                            f'cut off on its way here. Get or make the file again') from error
        self.names = [name.removesuffix('.npy') for name in self._archive.namelist()]

    def __enter__(self) -> 'Npz':
        return self

    def __exit__(self, *_) -> None:
        self._archive.close()
        self._file.close()

    def header(self, name: str) -> Header:
        """Of one array, checked: numbers in C order, and as many bytes as the header says."""
        with self._open(name) as entry:
            return self._header(entry, name)

    def array(self, name: str) -> np.ndarray:
        """One whole array; for small ones."""
        with self._open(name) as entry:
            header = self._header(entry, name)
            data = self._exactly(entry, math.prod(header.shape) * header.dtype.itemsize, name)
            self._end(entry, name)
        return np.frombuffer(data, header.dtype).reshape(header.shape)

    def rows(self, name: str, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The rows of one array in these ascending ranges; one range at a time is in memory."""
        with self._open(name) as entry:
            header = self._header(entry, name)
            row, at = math.prod(header.shape[1:]) * header.dtype.itemsize, 0
            for wanted in ranges:
                self._skip(entry, (wanted.start - at) * row, name)
                data = self._exactly(entry, len(wanted) * row, name)
                at = wanted.stop
                yield np.frombuffer(data, header.dtype).reshape(len(wanted), *header.shape[1:])
            self._skip(entry, (header.shape[0] - at) * row, name)     # to the end: zipfile compares checksums
            self._end(entry, name)

    def _open(self, name: str):
        try:
            return self._archive.open(name + '.npy')
        except KeyError:
            raise UserError(f'{self.path} has no array {name}, only '
                            f'{", ".join(self.names) or "none"}') from None
        except (*_DAMAGE, RuntimeError) as error:
            raise self._damaged(name, error) from error

    def _header(self, entry, name: str) -> Header:
        with self._explained(name):
            major, _ = version = np.lib.format.read_magic(entry)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(entry)
            header = Header(shape, dtype, fortran, entry.tell())
        if dtype.hasobject:
            raise UserError(f'{self.path}: {name} contains pickled objects (dtype {dtype}), which can run '
                            f'any program when they are read; refused. Save a plain uint8 array: '
                            f'np.savez(path, arr_0=images)')
        if fortran and len(shape) > 1:
            raise UserError(f'{self.path}: {name} is stored in Fortran order, which cannot be read image by '
                            f'image. Save np.ascontiguousarray of it')
        there = self._archive.getinfo(f'{name}.npy').file_size
        needed = header.size + math.prod(shape) * dtype.itemsize
        if there != needed:
            raise self._damaged(name, f'{there} bytes; {list(shape)} {dtype} in format {version} takes '
                                      f'{needed}')
        return header

    def _exactly(self, entry, count: int, name: str) -> bytes:
        with self._explained(name):
            data = entry.read(count)
        if len(data) != count:
            raise self._damaged(name, f'{len(data)} bytes, expected {count}')
        return data

    def _skip(self, entry, count: int, name: str) -> None:
        while count > 0:
            count -= len(self._exactly(entry, min(count, _SKIP), name))

    def _end(self, entry, name: str) -> None:
        with self._explained(name):
            entry.read(1)

    @contextlib.contextmanager
    def _explained(self, name: str):
        try:
            yield
        except _DAMAGE as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, reason) -> UserError:
        return UserError(f'{self.path}: {name} is damaged or cut off ({reason}). Get or make the file again')
