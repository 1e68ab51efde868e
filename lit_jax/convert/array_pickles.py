"""Reads arrays from pickled files as data: no name in a file is looked up, imported or called.

Formats: what torch.save writes, as a zip (PyTorch 1.6 and later) or as the older stream, and pickled nested
dicts of numpy arrays. PyTorch need not be installed. Files are memory-mapped; the values of a tensor are a
view of the map, checked against the checksum of the zip."""
import contextlib
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lit_jax.convert.pickle_machine import Call, Damage, Name, Storage, read_pickle
from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.paths import explain_unreadable

_MAGIC, _PROTOCOL = 0x1950a86a20f9469cfc6c, 1001       # what a torch file of before 1.6 begins with
_LEVELS, _AXES = 16, 16                                # of nested dicts of arrays; of one array
_STORAGES = {'FloatStorage': np.dtype('<f4'), 'DoubleStorage': np.dtype('<f8'),
             'HalfStorage': np.dtype('<f2'), 'BFloat16Storage': np.dtype(jnp.bfloat16),
             'LongStorage': np.dtype('<i8'), 'IntStorage': np.dtype('<i4'), 'ShortStorage': np.dtype('<i2'),
             'CharStorage': np.dtype('i1'), 'ByteStorage': np.dtype('u1'), 'BoolStorage': np.dtype('?'),
             'ComplexFloatStorage': np.dtype('<c8'), 'ComplexDoubleStorage': np.dtype('<c16')}
_NUMPY_CODES = {'f2', 'f4', 'f8', 'i4', 'i8'}
_REBUILD = 'torch._utils._rebuild_'
_VIEWS = {f'{_REBUILD}tensor', f'{_REBUILD}tensor_v2'}
_PARAMETERS = {f'{_REBUILD}parameter', f'{_REBUILD}parameter_with_state'}
# Tensors whose values cannot be read here.
_OTHER_TENSORS = {f'{_REBUILD}meta_tensor_no_storage': 'no values, saved from the device meta',
                  f'{_REBUILD}sparse_tensor': 'sparse', f'{_REBUILD}qtensor': 'quantised',
                  f'{_REBUILD}tensor_v3': 'a dtype of its own'}
_CORES = 'numpy.core', 'numpy._core'
_DTYPES = ('float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 '
           'uint32 uint64 float8_e4m3fn float8_e5m2 quint8 qint8 qint32').split()
NAMESPACE = 'argparse.Namespace'      # the command line, in checkpoints of DiT's and other training scripts
_KNOWN = frozenset({
    'collections.OrderedDict', 'collections.defaultdict', 'collections.Counter', 'builtins.dict',
    '__builtin__.dict', NAMESPACE, '_codecs.encode', *_VIEWS, *_PARAMETERS, *_OTHER_TENSORS,
    'torch.serialization._get_layout', 'torch.Size', 'torch.device', 'torch.Tensor',
    'torch.nn.parameter.Parameter', 'torch.storage.UntypedStorage', 'numpy.dtype', 'numpy.ndarray',
    *(f'torch.{name}' for name in (*_STORAGES, *_DTYPES)),
    *(f'{core}.multiarray.{name}' for core in _CORES for name in ('_reconstruct', 'scalar')),
    *(f'{core}.numeric._frombuffer' for core in _CORES)})


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, offset and strides in elements; or, without a storage, why it has no values."""
    shape: tuple[int, ...]
    dtype: str
    storage: str | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where the values of a storage are; crc of its bytes, None in files without."""
    start: int
    length: int
    crc: int | None


class PickledFile:
    """A file of pickled data. content: dicts, lists, tuples, numbers, texts, and what `tensor` and `array`
    turn into tensors and arrays."""

    def __init__(self, path):
        """Raises UserError for a file that is damaged, of another kind, or that names anything unknown."""
        self._path, self._map, self._checked = Path(path), None, set()
        with self._explained():
            data = self._data()
            head = bytes(data[:32])
            if head.startswith(b'PK'):
                self.content, self._places = _read_zip(self._path, data)
            elif is_old_torch(head):
                self.content, self._places = _read_stream(data)
            else:
                self.content, self._places = read_pickle(data, 0, _KNOWN)[0], {}

    def tensor(self, value, name) -> Tensor | None:
        """The tensor that a value of `content` is; None if it is none. name: for messages."""
        with self._explained(name):
            return _tensor(value, self._places)

    def array(self, value, name) -> np.ndarray | None:
        """The values of a tensor or numpy array in `content`; None for another value."""
        with self._explained(name):
            tensor = _tensor(value, self._places)
        return _numpy_array(value, self._explained(name)) if tensor is None else self.values(tensor, name)

    def values(self, tensor: Tensor, name) -> np.ndarray:
        """A view of the values in the mapped file, not to be written to."""
        with self._explained(name):
            if tensor.storage is None:
                raise UserError(f'holds {shown_name(name)}, whose values cannot be read ({tensor.dtype})')
            place, data, dtype = self._places[tensor.storage], self._data(), _numpy_dtype(tensor.dtype)
            if place.start + place.length > len(data):
                raise Damage('the file has become shorter')
            if place.crc is not None and tensor.storage not in self._checked:
                if zlib.crc32(memoryview(data)[place.start:place.start + place.length]) != place.crc:
                    raise Damage('its values are not those of the checksum in the file')
                self._checked.add(tensor.storage)
            if not math.prod(tensor.shape):
                return np.zeros(tensor.shape, dtype)
            whole = np.frombuffer(data, dtype, place.length // dtype.itemsize, place.start)
            steps = [step * dtype.itemsize for step in tensor.stride]
            return np.lib.stride_tricks.as_strided(whole[tensor.offset:], tensor.shape, steps,
                                                   writeable=False)

    def release(self) -> None:
        """Drops the map until values are asked for again; arrays that were given stay."""
        self._map = None

    def _data(self) -> mmap.mmap:
        if self._map is None:
            with explain_unreadable(self._path), open(self._path, 'rb') as file:
                if not file.seek(0, 2):
                    raise Damage('it is empty')
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    @contextlib.contextmanager
    def _explained(self, name=None) -> Iterator[None]:
        where = '' if name is None else f'{shown_name(name)}: '
        try:
            yield
        except Damage as error:
            raise UserError(f'{self._path} is truncated or damaged ({where}{error}); get it again') from None
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(str(self._path)) else f'{self._path} {text}') from error


def is_old_torch(head: bytes) -> bool:
    """Whether a file begins like one of torch.save before PyTorch 1.6."""
    return head.startswith(b'\x80') and _MAGIC.to_bytes(10, 'little') in head[:32]


def read_arrays(path) -> dict:
    """The (nested) dict of numpy arrays in a file; other entries are left out.

    Raises UserError for a file that is damaged, of another kind, or that names anything unknown."""
    file = PickledFile(path)
    if not isinstance(file.content, dict):
        raise UserError(f'{path} holds a {kind_of(file.content)}, expected named arrays')
    seen: set[int] = set()

    def plain(tree: dict, level: int) -> dict:
        if id(tree) in seen or level > _LEVELS:
            raise UserError(f'{path} is damaged: its dicts are nested too deep, or one is in two places')
        seen.add(id(tree))
        found = {str(key): plain(value, level + 1) if type(value) is dict else file.array(value, key)
                 for key, value in tree.items()}
        return {key: value for key, value in found.items() if value is not None}

    return plain(file.content, 0)


def flat_names(tree: Mapping, prefix: str = '') -> dict[str, np.ndarray]:
    """{'a': {'b': array}} -> {'a.b': array}."""
    flat = {}
    for name, value in tree.items():
        name = f'{prefix}{name}'
        flat |= flat_names(value, f'{name}.') if isinstance(value, Mapping) else {name: value}
    return flat


def kind_of(value) -> str:
    """What a value of a file's content is, for messages."""
    return shown_name(value.name) if isinstance(value, Call | Name) else type(value).__name__


def _read_zip(path: Path, data) -> tuple[object, dict[str, _Place]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, RuntimeError, struct.error, ValueError, EOFError,
            LookupError) as error:
        raise Damage(f'as a zip file: {error}') from None
    by_name = {member.filename: member for member in members}
    if len(by_name) != len(members):
        raise Damage('the zip file holds two members of one name')
    roots = [name.removesuffix('data.pkl') for name in by_name if name.split('/')[1:] == ['data.pkl']]
    if not roots:
        raise UserError('is a zip file, but none of torch.save: it holds no data.pkl')
    root = roots[0]
    if any(name.startswith(f'{root}code/') for name in by_name):
        raise UserError('is a TorchScript program; save its weights alone: torch.save(model.state_dict(), '
                        '"weights.pt")')
    places = {name.removeprefix(root): _place(member, data) for name, member in by_name.items()
              if name.startswith(root)}
    order = places.get('byteorder')
    if order and bytes(data[order.start:order.start + order.length]) != b'little':
        raise UserError('was written on a big-endian machine; save it again on another')
    table = places['data.pkl']
    part = bytes(data[table.start:table.start + table.length])
    if table.crc is not None and zlib.crc32(part) != table.crc:
        raise Damage('data.pkl is not that of the checksum in the file')
    values = {name.removeprefix('data/'): place for name, place in places.items() if name.startswith('data/')}
    return read_pickle(part, 0, _KNOWN)[0], values


def _place(member: zipfile.ZipInfo, data) -> _Place:
    name = shown_name(member.filename)
    if member.flag_bits & 1:
        raise UserError(f'holds an encrypted member ({name}); torch.save writes none: save it again')
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise UserError(f'holds a compressed member ({name}); torch.save writes none: save it again')
    header = bytes(data[member.header_offset:member.header_offset + 30])
    if len(header) < 30 or header[:4] != b'PK\x03\x04':
        raise Damage(f'the zip member {name} is not where the list of members says')
    start = member.header_offset + 30 + sum(struct.unpack('<HH', header[26:30]))
    if start + member.file_size > len(data):
        raise Damage(f'the zip member {name} reaches beyond the end')
    return _Place(start, member.file_size, member.CRC or None)      # 0: torch.save was told to write none


def _read_stream(data) -> tuple[object, dict[str, _Place]]:
    """Five pickles (magic number, protocol, machine, content, keys), then each storage's length and bytes."""
    at, parts = 0, []
    for _ in range(5):
        part, at = read_pickle(data, at, _KNOWN)
        parts.append(part)
    magic, protocol, machine, content, keys = parts
    if magic != _MAGIC or protocol != _PROTOCOL or type(machine) is not dict or type(keys) is not list \
            or machine.get('little_endian') is not True:
        raise UserError('is a torch file of an unknown form; save it again with a PyTorch of today')
    sizes, places = _storage_sizes(content), {}
    for key in keys:
        if type(key) is not str or key not in sizes or at + 8 > len(data):
            raise Damage('the list of its storages is not that of its tensors')
        count, = struct.unpack('<q', data[at:at + 8])
        length = count * sizes[key]
        if not 0 <= length <= len(data) - at - 8:
            raise Damage('the values end too early')
        places[key] = _Place(at + 8, length, None)
        at += 8 + length
    return content, places


def _storage_sizes(content) -> dict[str, int]:
    """{key: bytes of one element} of all storages below `content`, each object visited once."""
    sizes, waiting, seen = {}, [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Storage):
            key, dtype = _storage_fields(value)
            sizes[key] = dtype.itemsize
        elif isinstance(value, tuple | list | dict | Call) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else \
                [value.args, value.state] if isinstance(value, Call) else value
    return sizes


def _storage_fields(storage: Storage) -> tuple[str, np.dtype]:
    """(key, dtype) of ('storage', class, key, device, count[, view of another])."""
    match storage.fields:
        case ('storage', Name() as kind, str() | int() as key, _, _, *view) if not any(map(_is_given, view)):
            if (dtype := _STORAGES.get(kind.name.removeprefix('torch.'))) is not None:
                return str(key), dtype
            raise Damage(f'a storage is a {shown_name(kind.name)}, which is not known')
    raise Damage('a storage is not described as torch.save does')


def _is_given(value) -> bool:
    return value is not None


def _tensor(value, places: Mapping[str, _Place]) -> Tensor | None:
    for _ in range(4):      # a parameter holds a tensor
        if not (isinstance(value, Call) and value.name in _PARAMETERS and value.args):
            break
        value = value.args[0]
    if not isinstance(value, Call):
        return None
    if value.name in _OTHER_TENSORS:
        return Tensor((), _OTHER_TENSORS[value.name])
    if value.name not in _VIEWS:
        return None
    match value.args:
        case (Storage() as storage, int() as offset, tuple() | Call() as shape, tuple() as stride, *_):
            return _view(storage, offset, _sides(shape), _sides(stride), places)
    raise Damage('a tensor is not described as torch.save does')


def _sides(value) -> tuple[int, ...]:
    if isinstance(value, Call) and value.name == 'torch.Size' and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple or len(value) > _AXES or not all(type(side) is int and side >= 0
                                                                 for side in value):
        raise Damage('the shape of a tensor is none')
    return value


def _view(storage: Storage, offset: int, shape: tuple, stride: tuple, places) -> Tensor:
    key, dtype = _storage_fields(storage)
    if key not in places:
        raise Damage('a tensor has no values in the file')
    length = places[key].length
    elements, count = math.prod(shape), length // dtype.itemsize
    if length % dtype.itemsize or len(shape) != len(stride) or offset < 0:
        raise Damage('a tensor and its storage do not belong together')
    if elements > count:
        raise Damage(f'a tensor of shape {shown(shape)} has only {count} values; if it is an expanded one, '
                     f'save x.contiguous() in its place')
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if elements and last >= count:
        raise Damage('a tensor reaches outside of its values')
    if not elements:
        offset, stride = 0, (0,) * len(shape)
    return Tensor(shape, dtype.name, key, offset, stride)


def _numpy_dtype(name: str) -> np.dtype:
    return next(dtype for dtype in _STORAGES.values() if dtype.name == name)


def _numpy_array(value, explained) -> np.ndarray | None:
    """A numpy array, in the forms of numpy 1 and 2, of protocols 2 to 5; None for another value."""
    with explained:
        if not isinstance(value, Call):
            return None
        if value.name in {f'{core}.multiarray._reconstruct' for core in _CORES}:
            match value.state:
                case (_, tuple() as shape, dtype, bool() as fortran, data):
                    return _filled(_bytes(data), dtype, shape, 'F' if fortran else 'C')
            raise Damage('a numpy array is not described as numpy does')
        if value.name in {f'{core}.numeric._frombuffer' for core in _CORES}:
            match value.args:
                case (bytes() as data, dtype, tuple() as shape, 'C' | 'F' as order):
                    return _filled(data, dtype, shape, order)
            raise Damage('a numpy array is not described as numpy does')
        return None


def _filled(data: bytes | None, dtype, shape: tuple, order: str) -> np.ndarray:
    if not isinstance(dtype, Call) or dtype.name != 'numpy.dtype' or not dtype.args:
        raise Damage('the dtype of a numpy array is none')
    code = dtype.args[0]
    if type(code) is not str or code not in _NUMPY_CODES or data is None:
        raise UserError(f'holds an array of the type {shown(code)}, expected floats or integers')
    state = dtype.state if isinstance(dtype.state, tuple) else ()
    order_of_bytes = state[1] if len(state) > 1 and state[1] in ('<', '>') else '<'
    kind, shape = np.dtype(order_of_bytes + code), _sides(shape)
    if math.prod(shape) * kind.itemsize != len(data):
        raise Damage('a numpy array has not the values of its shape')
    return np.frombuffer(data, kind).reshape(shape, order=order)


def _bytes(data) -> bytes | None:
    """Bytes, in protocol 2 written as a text in latin1; None for anything else."""
    if isinstance(data, Call) and data.name == '_codecs.encode' and len(data.args) == 2:
        text, encoding = data.args
        if isinstance(text, str) and encoding == 'latin1':
            try:
                return text.encode('latin1')
            except UnicodeEncodeError:
                raise Damage('the values of a numpy array are none') from None
    return data if isinstance(data, bytes) else None
