"""Reads arrays of an .npz file block by block, and refuses pickled objects.

An .npz is a zip file of .npy files, stored or deflated. Image sets take 10 to 40 GB, so the header of an
array is read first, then its rows in the order of the file. Nothing is allocated that the file is too small
to hold.
"""
import contextlib
import lzma
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name
from lit_jax.runtime.paths import as_path, explain_unreadable

_SKIP = 1 << 24
# Deflating makes zeros a thousand times smaller. What is read at once may take this many bytes, and so many
# times the bytes of the file.
_AT_ONCE, _RATIO = 1 << 27, 100
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_KINDS = 'biufcSU'      # of numbers and text
# What zipfile, zlib and numpy raise for damaged or foreign files; found by fuzzing.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RuntimeError,
          LookupError, TypeError, ArithmeticError, SyntaxError, tokenize.TokenError,
          AttributeError, MemoryError)


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
        with explain_unreadable(self.path):
            if not self.path.is_file():
                what = 'is a folder' if self.path.is_dir() else 'does not exist'
                raise UserError(f'{self.path} {what}; expected an .npz file')
            self._file = self.path.open('rb')
        try:
            self._most = _AT_ONCE + _RATIO * self._file.seek(0, os.SEEK_END)
            self._archive = zipfile.ZipFile(self._file)
            self.names = self._member_names()
        except DAMAGE as error:
            self._file.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f'{self.path} is not a whole .npz file ({reason_of(error)}): it is something '
                            f'else, or was cut off on its way here. Get or make the file again') from error

    def __enter__(self) -> 'Npz':
        return self

    def __exit__(self, *_) -> None:
        self._archive.close()
        self._file.close()

    def header(self, name: str) -> Header:
        """Of one array, checked: numbers or text in C order, and as many bytes as the header says."""
        with self._open(name) as entry:
            return self._header(entry, name)

    def array(self, name: str) -> np.ndarray:
        """One whole array; for small ones."""
        with self._open(name) as entry:
            header = self._header(entry, name)
            data = self._exactly(entry, math.prod(header.shape) * header.dtype.itemsize, name)
            self._end(entry, name)
        return np.frombuffer(data, header.dtype).reshape(header.shape)     # a view, read-only

    def text(self, name: str) -> str:
        """One array that holds a single text."""
        array = self.array(name)
        if array.shape != () or array.dtype.kind != 'U':
            raise self._damaged(name, f'it is {array.dtype} {list(array.shape)}, expected one text')
        with self._explained(name):     # str(array) would let impossible characters in
            return array.astype(array.dtype.newbyteorder('<')).tobytes().decode('utf-32-le').rstrip('\0')

    def rows(self, name: str, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """The rows of one array in these ascending ranges; one range at a time is in memory. Read to the
        end, also damage elsewhere in the array is found."""
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

    def check(self, name: str) -> None:
        """Reads an array to its end. UserError where it is damaged."""
        with self._open(name) as entry:
            header = self._header(entry, name)
            self._skip(entry, math.prod(header.shape) * header.dtype.itemsize, name)
            self._end(entry, name)

    def _member_names(self) -> list[str]:
        members = self._archive.namelist()
        if twice := next((name for name in members if members.count(name) > 1), None):
            raise UserError(f'{self.path} has two members {shown_name(twice)}: it does not say which one is '
                            f'meant. Make the file again')
        return [name.removesuffix('.npy') for name in members if name.endswith('.npy')]

    def _open(self, name: str):
        if name not in self.names:
            raise UserError(f'{self.path} has no array {name}, only {shown_names(self.names)}')
        with self._explained(name):
            info = self._archive.getinfo(f'{name}.npy')
            if info.compress_type not in _METHODS or info.flag_bits & 1:
                raise UserError(f'{self.path}: {shown_name(name)} is encrypted, or compressed in another way '
                                f'than .npz files are. Save it with np.savez or np.savez_compressed')
            return self._archive.open(info)

    def _header(self, entry, name: str) -> Header:
        with self._explained(name):
            major, _ = version = np.lib.format.read_magic(entry)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(entry)
            header = Header(shape, dtype, fortran, entry.tell())
        if dtype.hasobject:
            raise UserError(f'{self.path}: {shown_name(name)} contains pickled objects (dtype '
                            f'{shown_name(dtype)}), which can run any program when they are read; refused. '
                            f'Save a plain uint8 array: np.savez(path, arr_0=images)')
        if dtype.kind not in _KINDS or not dtype.itemsize:
            raise UserError(f'{self.path}: {shown_name(name)} is {shown_name(dtype)}; expected numbers')
        if fortran and len(shape) > 1:
            raise UserError(f'{self.path}: {shown_name(name)} is stored in Fortran order, which cannot be '
                            f'read image by image. Save np.ascontiguousarray of it')
        if len(shape) > 32 or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
            raise self._damaged(name, f'its shape is {shown(list(shape))}')
        there = self._archive.getinfo(entry.name).file_size
        needed = header.size + math.prod(shape) * dtype.itemsize
        if there != needed:
            raise self._damaged(name, f'{there} bytes; {shown(list(shape))} {shown_name(dtype)} in format '
                                      f'{version} takes {needed}')
        return header

    def _exactly(self, entry, count: int, name: str) -> bytes:
        if count > self._most:
            raise self._damaged(name, f'{count} bytes at once are more than the file can hold')
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
        except DAMAGE as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(name, reason_of(error)) from error

    def _damaged(self, name: str, reason) -> UserError:
        return UserError(f'{self.path}: {shown_name(name)} is damaged or cut off ({reason}). Get or make the '
                         f'file again')


def shown_names(names: Iterable[str], most: int = 8) -> str:
    """Names of arrays as a message shows them."""
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(map(shown_name, names[:most])) or 'none') + more
