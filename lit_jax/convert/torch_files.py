"""Readers of PyTorch's weight files: names, shapes and dtypes at once, values one tensor at a time.

Formats: `.pt`/`.pth`/`.bin` files of torch.save (a bare state dict, or a training checkpoint with `model` and
`ema`), `.safetensors`, and folders of Hugging Face diffusers, also in shards; told by content, not by name.
PyTorch is not needed, and no code from a file is ever run (`lit_jax.convert.array_pickles`). Files are
memory-mapped, and `release` drops the mapping, so that a 2.7 GB file does not stay in memory beside its
copy."""
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from lit_jax.convert.array_pickles import NAMESPACE, PickledFile, is_old_torch, kind_of
from lit_jax.convert.pickle_machine import Call
from lit_jax.convert.torch_hub import check_hub_config, knows_class, read_hub_config
from lit_jax.models.arch import check_arch
from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.json_file import parse_json, read_json, unsealed
from lit_jax.runtime.paths import explain_unreadable

FLOATS = ('float32', 'float16', 'bfloat16')
_LONGEST_HEADER = 100_000_000      # bytes of JSON that the safetensors format allows
METADATA_KEY = 'lit_jax'           # of a .safetensors file that we wrote: the model folder's config as JSON
_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F64': 'float64'}
# What DistributedDataParallel, FSDP, torch.compile, checkpointing and trainers put before and into names.
_PREFIXES = ('module.', '_orig_mod.', '_fsdp_wrapped_module.', '_checkpoint_wrapped_module.', 'model.',
             'diffusion_model.', 'net.')
_INNER = re.compile(r'(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.')
CONFIG = 'config.json'
_HF_STEMS = ('diffusion_pytorch_model', 'pytorch_model', 'model')
# STEM[.VARIANT][-00001-of-00002][.VARIANT].SUFFIX and STEM.SUFFIX.index[.VARIANT].json, of Hugging Face.
_VARIANT = r'(?:\.(?P<variant>fp16|bf16|fp32|ema|non_ema))?'
_OTHER = _VARIANT.replace('variant', 'other')
_WEIGHTS_NAME = re.compile(rf'^(?P<stem>.+?){_VARIANT}(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}))?{_OTHER}'
                           r'\.(?P<suffix>safetensors|bin)$')
_INDEX_NAME = re.compile(rf'^(?P<stem>.+?){_VARIANT}\.(?P<suffix>safetensors|bin)\.index{_OTHER}\.json$')


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading its values."""
    shape: tuple[int, ...]
    dtype: str


class Reader(Protocol):
    """One file of tensors."""

    def infos(self) -> dict[str, TensorInfo]: ...      # every tensor, in the order of the file
    def read(self, key: str) -> np.ndarray: ...        # values in float32, possibly a view of the mapped file
    def release(self) -> None: ...                     # drops the map until the next `read`; views stay


@dataclass
class Source:
    """All tensors of a checkpoint, whatever files they are in.

    Attributes:
        tensors: key -> TensorInfo, without wrapper prefixes (`module.`).
        files: the files read. weights: 'ema', 'model', or 'state_dict' (a bare one).
        problems: tensors given twice, entries that are no tensors.
        told: the command line in a training checkpoint, {name: number or text}.
        config: stored in our own export. hub_config: config.json of a diffusers folder. classes: class names
            of a diffusers pipeline. None if there are none."""
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...] = ()
    weights: str = 'state_dict'
    problems: list[str] = field(default_factory=list)
    told: dict = field(default_factory=dict)
    config: dict | None = None
    hub_config: dict | None = None
    classes: list[str] | None = None
    _owner: dict[str, tuple[Reader, str]] = field(default_factory=dict, repr=False)

    def read(self, key: str) -> np.ndarray:
        """float32 values of one tensor."""
        reader, name = self._owner[key]
        return reader.read(name)

    def release(self) -> None:
        """Releases the memory of the mapped files."""
        for reader in {id(reader): reader for reader, _ in self._owner.values()}.values():
            reader.release()

    def problem(self, key: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor cannot be used with this shape, as far as shows without its values; None if it can."""
        info = self.tensors.get(key)
        if info is None:
            return f'missing tensor: {shown_name(key)} {list(shape)}'
        if tuple(info.shape) != tuple(shape):
            return f'misshaped tensor: {shown_name(key)} has {list(info.shape)}, expected {list(shape)}'
        if info.dtype not in FLOATS:
            return (f'wrong dtype in tensor: {shown_name(key)} is {info.dtype}, expected one of '
                    f'{", ".join(FLOATS)}')
        return None

    def add(self, reader: Reader, file_name: str = '') -> None:
        """Adds the tensors of one reader; a key that is already there is a problem."""
        for name, info in reader.infos().items():
            key = _unwrapped(name)
            if key in self.tensors:
                where = f' (again in {file_name})' if file_name else ''
                also = f', also as {shown_name(name)}' if name != key else ''
                self.problems.append(f'duplicate tensor: {shown_name(key)}{where}{also}')
            else:
                self.tensors[key], self._owner[key] = info, (reader, name)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other keys, which are free."""
        for old, new in names.items():
            self.tensors[new], self._owner[new] = self.tensors.pop(old), self._owner.pop(old)


def open_source(path, weights: str = 'ema') -> Source:
    """Opens a checkpoint file, an index of shards (.index.json), or a folder. UserError if it is missing,
    unreadable, or no plain data.

    weights: which of a training checkpoint's weights, 'ema' or 'model'."""
    if weights not in ('ema', 'model'):
        raise UserError(f'unknown weights {shown(weights)}; a training checkpoint holds "ema" and "model"')
    path = Path(path)
    if path.name == CONFIG and path.is_file():
        path = path.parent
    if path.is_dir():
        return _open_folder(path, weights)
    if not path.exists():
        where = f' (it is a link to {os.readlink(path)}, which does not)' if path.is_symlink() else ''
        raise UserError(f'{path} does not exist{where}')
    if path.suffix == '.npz':
        raise UserError(f'{path} is a set of images or a reference, not a checkpoint; give a .pt or '
                        f'.safetensors file, or a Hugging Face folder')
    if _INDEX_NAME.match(path.name):
        source = _open_files(*_indexed(path), weights)
        _add_hub_config(source, path.parent)
        return source
    source = Source({}, (path,))
    _open_file(path, weights, source)
    if _has_hub_name(path) and source.config is None and knows_class(read_hub_config(path.parent)):
        _add_hub_config(source, path.parent)      # another config.json may lie beside a file of its own
    return source


def hub_parts(path) -> tuple[Path, Path]:
    """(the folder, what its weights are read from) of a Hugging Face folder, its config.json, or one of its
    files of weights. Twice `path` for anything else."""
    path = Path(path)
    if path.name == CONFIG and path.is_file():
        return path.parent, path.parent
    return (path.parent if path.is_file() and _has_hub_name(path) else path), path


def _has_hub_name(path: Path) -> bool:
    match = _WEIGHTS_NAME.match(path.name) or _INDEX_NAME.match(path.name)
    return match is not None and match['stem'] in _HF_STEMS


def open_weights(path: Path, weights: str = 'ema') -> Source:
    """All tensors of a Hugging Face folder, of any model, or of one file of it. UserError if it has none."""
    if not path.is_dir():
        return _open_files(*(_indexed(path) if _INDEX_NAME.match(path.name) else ([path], [])), weights)
    files, index = _hub_files(path)
    if not files:
        inside = ', '.join(sorted(shown_name(entry.name) for entry in path.iterdir())[:8]) or 'nothing'
        raise UserError(f'{path} holds no weights: expected model.safetensors, '
                        f'diffusion_pytorch_model.safetensors or .bin (or their .index.json with its files); '
                        f'it holds {inside}. Give a single checkpoint by its own path')
    return _open_files(files, index, weights)


def _open_files(files: list[Path], index: list[str], weights: str) -> Source:
    source = Source({}, tuple(files))
    for file in files:
        _open_file(file, weights, source)
    source.problems += [f'missing tensor: {shown_name(key)} (in the index, not in the files)' for key in index
                        if _unwrapped(key) not in source.tensors]
    return source


def source_from_arrays(state: Mapping[str, np.ndarray]) -> Source:
    """A source over arrays in memory."""
    source = Source({})
    source.add(_ArrayReader(state))
    return source


class _ArrayReader:
    """Arrays in memory (numpy, also bfloat16 of ml_dtypes)."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self._state = {key: np.asarray(value) for key, value in state.items()}

    def infos(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(value.shape, value.dtype.name) for key, value in self._state.items()}

    def read(self, key: str) -> np.ndarray:
        return self._state[key].astype(np.float32, copy=False)

    def release(self) -> None:
        pass


class _SafetensorsReader:
    def __init__(self, path: Path):
        self._path, self._handle = path, None
        handle = self._open()
        self.metadata = handle.metadata() or {}
        self._infos = {}
        for key in handle.keys():
            part = handle.get_slice(key)
            dtype = part.get_dtype()
            self._infos[key] = TensorInfo(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def _open(self):
        if self._handle is None:
            try:
                with explain_unreadable(self._path):
                    self._handle = safe_open(self._path, framework='numpy')
            except SafetensorError as error:
                raise UserError(f'{self._path} is truncated or damaged ({shown_name(error)}); get it '
                                f'again') from error
        return self._handle

    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> np.ndarray:
        return self._open().get_tensor(key).astype(np.float32, copy=False)

    def release(self) -> None:
        self._handle = None


class _TorchReader:
    def __init__(self, path: Path, weights: str):
        self._file, self.problems = PickledFile(path), []
        content, self.chosen = _choose(self._file, weights, path)
        self._tensors = {}
        for key, value in content.items():
            if tensor := self._file.tensor(value, key):
                self._tensors[str(key)] = tensor
            else:
                self.problems.append(f'not a tensor: {shown_name(key)} ({kind_of(value)})')
        self.told = _told(self._file.content)
        self.release()

    def infos(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(tensor.shape, tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        return self._file.values(self._tensors[key], key).astype(np.float32, copy=False)

    def release(self) -> None:
        self._file.release()


# Where trainers keep the weights: DiT's and SiT's, PixArt's, Lightning's and timm's.
_NAMES = {'ema': ('ema', 'state_dict_ema', 'ema_state_dict', 'model_ema', 'ema_model'),
          'model': ('model', 'model_state_dict')}


def _choose(file: PickledFile, weights: str, path: Path) -> tuple[dict, str]:
    """(the state dict, 'ema', 'model' or 'state_dict') of a file: bare, or one of a training checkpoint."""
    content = file.content
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {kind_of(content)}, expected a state dict (name -> tensor) or a '
                        f'training checkpoint {{model, ema, opt, args}}')

    def find(names) -> dict | None:
        return next((content[name] for name in names if isinstance(content.get(name), dict)), None)

    if (found := find(_NAMES[weights])) is not None:
        return found, weights
    if (found := find(['state_dict'])) is not None:
        return found, 'state_dict'
    if available := [name for name, keys in _NAMES.items() if find(keys) is not None]:
        raise UserError(f'{path} is a training checkpoint without {shown(weights)} weights; it has '
                        f'{", ".join(available)}: use --weights={available[0]}')
    if not any(file.tensor(value, key) for key, value in content.items()):
        keys = ', '.join(map(shown_name, list(content)[:8])) or 'nothing'
        raise UserError(f'{path} holds no weights (found: {keys}); expected a state dict or a training '
                        f'checkpoint {{model, ema, opt, args}}')
    return content, 'state_dict'


def _told(content) -> dict:
    """What the command line says that a training checkpoint keeps in `args`, or LightningDiT's in the section
    `transport` of `config`: its numbers and texts."""
    args = content.get('args') if isinstance(content, dict) else None
    if args is None and isinstance(content, dict) and isinstance(content.get('config'), dict):
        args = content['config'].get('transport')
    if isinstance(args, Call) and args.name == NAMESPACE:
        args = args.state
    if not isinstance(args, dict):
        return {}
    return {name: value for name, value in args.items() if isinstance(value, str | int | float | bool)}


def _unwrapped(key: str) -> str:
    """The key without what wraps a model, or one of its blocks."""
    while key.startswith(_PREFIXES):
        key = key.split('.', 1)[1]
    return _INNER.sub('', key)


def _open_file(path: Path, weights: str, source: Source) -> None:
    """Adds the tensors of one file to `source`."""
    if _sniff(path) == 'safetensors':
        reader = _SafetensorsReader(path)
        source.config = _own_config(path, reader.metadata) or source.config
    else:
        reader = _TorchReader(path, weights)
        source.weights, source.told = reader.chosen, reader.told
        source.problems += reader.problems
    source.add(reader, path.name)


# What the metadata of our exports must hold; `check_arch` looks at the model more closely.
_OWN = {'model': {'family': str, 'mixer': {'name': str}}, 'diffusion?': {'steps?': int, 'kind': str},
        'latent?': {'space': str, 'vae?': str, 'scale': float}, 'classes?': [str], 'text?': {str: object},
        'provenance?': {str: object}}


def _own_config(path: Path, metadata: Mapping[str, str]) -> dict | None:
    if METADATA_KEY not in metadata:
        return None
    where = f'the metadata of {path}'
    config = unsealed(parse_json(metadata[METADATA_KEY], where, _OWN), where)
    try:
        check_arch(config['model'])
    except UserError as error:
        raise UserError(f'{where} describe no model that this version knows: {error}; export it again, or '
                        f'strip its metadata') from error
    return {name: value for name, value in config.items() if value is not None}


def _sniff(path: Path) -> str:
    """'torch' or 'safetensors' by the first bytes; UserError that says what else the file is."""
    with explain_unreadable(path), open(path, 'rb') as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise UserError(f'{path} is empty; get it again')
    # First: the length at the start of a .safetensors file can begin like a zip or a pickle.
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _LONGEST_HEADER:
        return 'safetensors'
    if head[:4] == b'PK\x03\x04' or is_old_torch(head):
        return 'torch'
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise UserError(f'{path} is a web page, not a checkpoint, often a login or error page. Get the file '
                        f'itself, for instance with curl -L')
    if head.startswith(b'version https://git-lfs'):
        raise UserError(f'{path} is a Git LFS pointer, not the weights; run git lfs pull')
    if head[:1] == b'\x80' or b'\n' in head[:64] and head[:1] in b'(cl':
        raise UserError(f'{path} is a plain pickle, not a file of torch.save. Opening it can run code '
                        f'from the file, so it is not read. If you trust it, load it where it comes from and '
                        f'save its weights with torch.save')
    if path.suffix == '.safetensors':
        return 'safetensors'
    raise UserError(f'{path} is no checkpoint (.safetensors or of torch.save): it starts with '
                    f'{shown(head[:16])}')


def _open_folder(path: Path, weights: str) -> Source:
    """A diffusers pipeline folder (with transformer/), the transformer's own folder, or one of shards."""
    folder = path / 'transformer' if (path / 'transformer').is_dir() else path
    source = open_weights(folder, weights)
    if source.config is None:      # else it is our own folder, whose weights say everything
        _add_hub_config(source, folder)
    source.classes = _class_names(path / 'model_index.json')
    return source


def _add_hub_config(source: Source, folder: Path) -> None:
    """config.json of a diffusers folder; a folder of other shards has none."""
    path = folder / CONFIG
    if path.exists():
        source.files = (*source.files, path)
        source.hub_config = read_json(path, {str: object})
        check_hub_config(source.hub_config, str(path))


@dataclass
class _Set:
    """The files of one model in a folder: a single one, an index, or numbered shards."""
    single: Path | None = None
    index: Path | None = None
    shards: dict[int, Path] = field(default_factory=dict)
    count: int = 0


def _hub_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files of a folder, and the tensor names in their index."""
    sets: dict[tuple, _Set] = {}
    with explain_unreadable(folder):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if match := _INDEX_NAME.match(entry.name):
            key = _rank(match['stem'], match['variant'] or match['other'], match['suffix'])
            sets.setdefault(key, _Set()).index = entry
        elif match := _WEIGHTS_NAME.match(entry.name):
            found = sets.setdefault(_rank(match['stem'], match['variant'] or match['other'],
                                          match['suffix']), _Set())
            if match['number']:
                found.shards[int(match['number'])], found.count = entry, int(match['count'])
            else:
                found.single = entry
    if not sets:
        return [], []
    best = min(sets)
    others = [key for key in sets if key[0] == best[0] == len(_HF_STEMS) and key != best]
    if others:
        names = ', '.join(shown_name(key[3] + key[2]) for key in sorted([best, *others]))
        raise UserError(f'{folder} holds several sets of weights ({names}); give one by its own path')
    return _files_of(sets[best], folder)


def _rank(stem: str, variant: str | None, suffix: str) -> tuple:
    """Sorts sets of files: known names first, then whole precision, then safetensors."""
    known = _HF_STEMS.index(stem) if stem in _HF_STEMS else len(_HF_STEMS)
    return known, variant or '', {'safetensors': '', 'bin': 'bin'}[suffix], stem


def _files_of(found: _Set, folder: Path) -> tuple[list[Path], list[str]]:
    if found.single:
        return [found.single], []
    if found.index:
        return _indexed(found.index)
    if missing := [number for number in range(1, found.count + 1) if number not in found.shards]:
        raise UserError(f'{folder} has {len(found.shards)} of the {found.count} shards of its weights, the '
                        f'first that is missing is number {missing[0]}; get them again')
    return [found.shards[number] for number in sorted(found.shards)], []


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    names = read_json(index, {'weight_map': {str: str}})['weight_map']
    if not names:
        raise UserError(f'{index} names no files')
    # Only the names: an index must not lead out of its folder.
    files = [index.parent / Path(file).name for file in sorted(set(names.values()))]
    if missing := [shown_name(file.name) for file in files if not file.is_file()]:
        raise UserError(f'{index.parent} lacks files that its index names: {", ".join(missing[:8])}; get '
                        'them again')
    return files, list(names)


def _class_names(path: Path) -> list[str] | None:
    """The label names of a diffusers DiT pipeline, if complete."""
    labels = read_json(path, {'id2label?': {str: object}}, absent={}).get('id2label') or {}
    names = [labels.get(str(i)) for i in range(len(labels))]
    return names if names and all(isinstance(name, str) for name in names) else None
