"""Reads arrays from pickled files as data: no name in a file is looked up, imported or called.

Formats: dicts of tensors of torch.save, as a zip (PyTorch 1.6 and later) or as the older stream, and pickled
nested dicts of numpy arrays. PyTorch need not be installed. If a pickle names a class or a function, the
reader uses one of the few stand-ins below, which only record the file's facts of an array; any other name is
refused."""
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lit_jax.runtime.errors import UserError

_MAGIC, _PROTOCOL = 0x1950a86a20f9469cfc6c, 1001       # what a torch file of before 1.6 begins with
_STORAGES = {'FloatStorage': np.dtype('<f4'), 'DoubleStorage': np.dtype('<f8'),
             'HalfStorage': np.dtype('<f2'), 'BFloat16Storage': np.dtype(jnp.bfloat16),
             'LongStorage': np.dtype('<i8'), 'IntStorage': np.dtype('<i4')}
_NUMPY_CODES = {'f2', 'f4', 'f8', 'i4', 'i8'}
# Errors of reading wrong bytes as a pickle or a zip.
_DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, TypeError,
           ValueError, AttributeError, ArithmeticError, MemoryError)


def read_arrays(path) -> dict:
    """The (nested) dict of numpy arrays in a file; other entries are left out.

    Raises UserError for a file that is damaged, of another kind, or that names anything unknown."""
    path = Path(path)
    try:
        with open(path, 'rb') as file:
            head = file.read(32)
            file.seek(0)
            if head.startswith(b'PK'):
                content = _read_zip(file)
            elif head.startswith(b'\x80') and _MAGIC.to_bytes(10, 'little') in head:
                content = _read_stream(file)
            else:
                content = _plain(_Reader(file).load(), {})
    except UserError as error:
        raise UserError(f'{path} {error}') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
    except _DAMAGE as error:
        reason = f'{type(error).__name__}: {error}'
        raise UserError(f'{path} is truncated or damaged ({reason}); get it again') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, expected named arrays')
    return content


def flat_names(tree: Mapping, prefix: str = '') -> dict[str, np.ndarray]:
    """{'a': {'b': array}} -> {'a.b': array}."""
    flat = {}
    for name, value in tree.items():
        name = f'{prefix}{name}'
        flat |= flat_names(value, f'{name}.') if isinstance(value, Mapping) else {name: value}
    return flat


def _read_zip(file) -> dict:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        roots = [name.removesuffix('data.pkl') for name in names if name.split('/')[1:] == ['data.pkl']]
        if not roots:
            raise UserError('is a zip file, but none of torch.save: it holds no data.pkl')
        root = roots[0]
        if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
            raise UserError('was written on a big-endian machine; save it again on another')
        reader = _Reader(io.BytesIO(archive.read(f'{root}data.pkl')))
        content = reader.load()
        return _plain(content, {key: np.frombuffer(archive.read(f'{root}data/{key}'), storage.dtype)
                                for key, storage in reader.storages.items()})


def _read_stream(file) -> dict:
    """Five pickles (magic number, protocol, machine, content, keys), then each storage's length and bytes."""
    magic, protocol, machine = (_Reader(file).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not machine['little_endian']:
        raise UserError('is a torch file of an unknown form; save it again with a PyTorch of today')
    reader = _Reader(file)
    content, data = reader.load(), {}
    for key in _Reader(file).load():
        storage = reader.storages[key]
        count, = struct.unpack('<q', file.read(8))
        values = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
        if len(values) != count:
            raise EOFError('the values end too early')
        data[key] = values
    return _plain(content, data)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides in elements."""
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def values(self, data: np.ndarray) -> np.ndarray:
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if min((self.offset, *self.size, *self.stride)) < 0 or (math.prod(self.size) and last >= len(data)):
            raise ValueError('a tensor reaches outside of its values')
        steps = [step * data.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(data[self.offset:], self.size, steps).copy()


class _Mapping(dict):
    """Stands for dicts with attributes of their own."""


class _Dtype:
    """A numpy dtype."""

    def __init__(self, code: str, *_):
        if code not in _NUMPY_CODES:
            raise UserError(f'holds an array of the type {code}, expected floats or integers')
        self.code, self.order = code, '<'

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _Array:
    """A numpy array whose values follow."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, 'F' if fortran else 'C')

    def fill(self, data: bytes, dtype: _Dtype, shape: tuple, order: str) -> '_Array':
        order_of_bytes = dtype.order if dtype.order in '<>' else '<'
        self.array = np.frombuffer(data, order_of_bytes + dtype.code).reshape(shape, order=order)
        return self


class _Name(NamedTuple):
    """A class that is only named, never called."""
    name: str


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise ValueError(f'unknown encoding {encoding!r}')
    return text.encode('latin1')


_STAND_INS: dict[str, Callable] = {
    'collections.OrderedDict': _Mapping,
    'torch._utils._rebuild_tensor_v2': lambda storage, offset, size, stride, *_:
        _Tensor(storage, int(offset), tuple(size), tuple(stride)),
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Name('ndarray'),
    '_codecs.encode': _latin1,
    **{f'numpy.{core}.multiarray._reconstruct': lambda *_: _Array() for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': lambda data, dtype, shape, order:
       _Array().fill(data, dtype, shape, order) for core in ('core', '_core')},
    **{f'torch.{name}': _Name(name) for name in _STORAGES},
}


class _Reader(pickle.Unpickler):
    """Builds plain data and the stand-ins."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str):
        known = _STAND_INS.get(f'{module}.{name}')
        if known is None:
            raise UserError(f'is refused: it asks for {module}.{name}, and a file of weights needs nothing '
                            f'but arrays. Nothing of it was run')
        return known

    def persistent_load(self, pid):
        kind, storage_type, key, _, _, *view = pid
        if kind != 'storage' or any(view):
            raise ValueError(f'unknown entry {kind!r}')
        return self.storages.setdefault(str(key), _Storage(str(key), _STORAGES[storage_type.name]))


def _plain(content, data: Mapping[str, np.ndarray]):
    """Dicts and arrays out of dicts and stand-ins."""
    if isinstance(content, dict):
        found = {str(name): _plain(value, data) for name, value in content.items()}
        return {name: value for name, value in found.items() if isinstance(value, dict | np.ndarray)}
    if isinstance(content, _Tensor):
        return content.values(data[content.storage.key])
    return content.array if isinstance(content, _Array) else content
