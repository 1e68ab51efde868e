"""Readers of PyTorch's weight files: names, shapes and dtypes at once, values one tensor at a time.

Formats: `.pt`/`.pth`/`.bin` zip files of torch.save (a bare state dict, or a training checkpoint with `model`
and `ema`), `.safetensors`, and folders of Hugging Face diffusers, also in shards; told by content, not by
name. No code from a file is ever run: torch reads with `weights_only=True`, whose unpickler builds plain data
only. Files are memory-mapped, and `release` drops the mapping, so that a 2.7 GB file does not stay in memory
beside its copy."""
import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # the exception only: torch.load raises it for what it refuses
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from lit_jax.convert.torch_hub import check_hub_config
from lit_jax.models.mixers import find_mixer
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import explain_unreadable

FLOATS = ('float32', 'float16', 'bfloat16')
_LONGEST_HEADER = 100_000_000      # bytes of JSON that the safetensors format allows
METADATA_KEY = 'lit_jax'           # of a .safetensors file that we wrote: the model folder's config as JSON
_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F64': 'float64'}
# What torch.load raises for damaged files: wrong opcodes fail in every way that Python code can.
_DAMAGE = (RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError,
           AssertionError, ArithmeticError)
_WRAPPERS = ('module.', '_orig_mod.')   # DistributedDataParallel, torch.compile
_HF_STEMS = ('diffusion_pytorch_model', 'diffusion_pytorch_model.fp16', 'pytorch_model', 'model')


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
        config: stored in our own export. hub_config: config.json of a diffusers folder. classes: class names
            of a diffusers pipeline. None if there are none."""
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...] = ()
    weights: str = 'state_dict'
    problems: list[str] = field(default_factory=list)
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
            return f'missing tensor: {key} {list(shape)}'
        if tuple(info.shape) != tuple(shape):
            return f'misshaped tensor: {key} has {list(info.shape)}, expected {list(shape)}'
        if info.dtype not in FLOATS:
            return f'wrong dtype in tensor: {key} is {info.dtype}, expected one of {", ".join(FLOATS)}'
        return None

    def add(self, reader: Reader, file_name: str = '') -> None:
        """Adds the tensors of one reader; a key that is already there is a problem."""
        for name, info in reader.infos().items():
            key = _unwrapped(name)
            if key in self.tensors:
                where = f' (again in {file_name})' if file_name else ''
                also = f', also as {name}' if name != key else ''
                self.problems.append(f'duplicate tensor: {key}{where}{also}')
            else:
                self.tensors[key], self._owner[key] = info, (reader, name)


def open_source(path, weights: str = 'ema') -> Source:
    """Opens a checkpoint file or a diffusers folder. UserError if it is missing, unreadable, or no plain
    data.

    weights: which of a training checkpoint's weights, 'ema' or 'model'."""
    if weights not in ('ema', 'model'):
        raise UserError(f'unknown weights {weights!r}; a training checkpoint holds "ema" and "model"')
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, weights)
    if not path.exists():
        raise UserError(f'{path} does not exist')
    source = Source({}, (path,))
    _open_file(path, weights, source)
    return source


def open_weights(folder: Path, weights: str = 'ema') -> Source:
    """All tensors of a Hugging Face folder, of any model. UserError if there are none."""
    files, index = _hub_files(folder)
    if not files:
        inside = ', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'
        raise UserError(f'{folder} holds no weights: expected model.safetensors, '
                        f'diffusion_pytorch_model.safetensors or .bin (or their .index.json with its files); '
                        f'it holds {inside}. Give a single checkpoint by its own path')
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UserError(f'{folder} lacks files that its index names: {", ".join(missing)}; get them again')
    source = Source({}, tuple(files))
    for file in files:
        _open_file(file, weights, source)
    source.problems += [f'missing tensor: {key} (in the index, not in the files)' for key in index
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
                self._handle = safe_open(self._path, framework='numpy')
            except SafetensorError as error:
                raise UserError(f'{self._path} is truncated or damaged ({error}); get it again') from error
        return self._handle

    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> np.ndarray:
        return self._open().get_tensor(key).astype(np.float32, copy=False)

    def release(self) -> None:
        self._handle = None


class _TorchReader:
    def __init__(self, path: Path, weights: str):
        self._path, self._weights, self._tensors = path, weights, None
        self.problems: list[str] = []
        self.chosen = 'state_dict'
        self._infos = {key: TensorInfo(tuple(x.shape), _torch_dtype(x)) for key, x in self._open().items()}
        self.release()

    def _open(self) -> dict:
        if self._tensors is None:
            content, self.chosen = _choose(_load_torch(self._path), self._weights, self._path)
            self._tensors = {key: value for key, value in content.items() if _is_tensor(value)}
            self.problems = [f'not a tensor: {key} ({type(value).__name__})' for key, value in content.items()
                             if key not in self._tensors]
        return self._tensors

    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> np.ndarray:
        return self._open()[key].detach().float().numpy()

    def release(self) -> None:
        self._tensors = None


def _is_tensor(value) -> bool:
    import torch
    return isinstance(value, torch.Tensor)


def _torch_dtype(tensor) -> str:
    name = str(tensor.dtype).removeprefix('torch.')
    return name if str(tensor.layout) == 'torch.strided' else f'{name} ({tensor.layout})'


def _load_torch(path: Path):
    """The content of a torch.save file as plain data, its tensors mapped from the file."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f'reading {path} needs PyTorch, which is not installed: pip install '
                        f'"lit_jax[torch]", or give the weights as .safetensors') from error
    try:
        # DiT's training checkpoints contain their command line as an argparse.Namespace: attributes only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from error
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split('. This is an internal')[0]
        raise UserError(f'{path} is truncated or damaged ({reason}); get it again') from error


def _refusal(path: Path, text: str) -> str:
    found = re.search(r'GLOBAL[: ]+`?([\w.]+\.[\w.]+)', text)
    what = f'it asks for {found[1]}' if found else 'it holds more than tensors and plain containers'
    return (f'{path} is refused: {what}, and opening that could run code from the file. Nothing of it was '
            f'run. If it is yours, save its weights alone: torch.save(model.state_dict(), "weights.pt")')


def _choose(content, weights: str, path: Path) -> tuple[Mapping, str]:
    """The state dict in the result of torch.load: bare, or one of a training checkpoint."""
    if not isinstance(content, Mapping):
        raise UserError(f'{path} holds a {type(content).__name__}, expected a state dict (name -> tensor) or '
                        f'a training checkpoint {{model, ema, opt, args}}')
    for name in (weights, f'state_dict_{weights}', 'state_dict'):     # the last two of PixArt's trainer
        if isinstance(content.get(name), Mapping):
            return {str(key): value for key, value in content[name].items()}, name.removeprefix('state_dict_')
    available = [name for name in ('ema', 'model') if isinstance(content.get(name), Mapping)]
    if available:
        raise UserError(f'{path} is a training checkpoint without {weights!r} weights; it has '
                        f'{", ".join(available)}: use --weights={available[0]}')
    if not any(_is_tensor(value) for value in content.values()):
        keys = ', '.join(map(str, list(content)[:8])) or 'nothing'
        raise UserError(f'{path} holds no weights (found: {keys}); expected a state dict or a training '
                        f'checkpoint {{model, ema, opt, args}}')
    return {str(key): value for key, value in content.items()}, 'state_dict'


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split('.', 1)[1]
    return key


def _open_file(path: Path, weights: str, source: Source) -> None:
    """Adds the tensors of one file to `source`."""
    kind = _sniff(path)
    reader = _SafetensorsReader(path) if kind == 'safetensors' else _TorchReader(path, weights)
    source.add(reader, path.name)
    if kind == 'safetensors':
        source.config = _own_config(path, reader.metadata) or source.config
    else:
        source.weights = reader.chosen
        source.problems += reader.problems


def _own_config(path: Path, metadata: Mapping[str, str]) -> dict | None:
    if METADATA_KEY not in metadata:
        return None
    where = f'the metadata of {path}'
    config = parse_json(metadata[METADATA_KEY], where)
    mixer = config['model'].get('mixer') if isinstance(config.get('model'), dict) else None
    try:
        find_mixer(mixer['name'] if isinstance(mixer, dict) and 'name' in mixer else None)
    except UserError as error:
        raise UserError(f'{where} describe no model that this version knows: {error}; export it again, or '
                        f'strip its metadata') from error
    return config


def _sniff(path: Path) -> str:
    """'torch' or 'safetensors' by the first bytes; UserError that says what else the file is."""
    with explain_unreadable(path), open(path, 'rb') as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise UserError(f'{path} is empty; get it again')
    if head[:4] == b'PK\x03\x04':
        return 'torch'
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise UserError(f'{path} is a web page, not a checkpoint, often a login or error page. Get the file '
                        f'itself, for instance with curl -L')
    if head.startswith(b'version https://git-lfs'):
        raise UserError(f'{path} is a Git LFS pointer, not the weights; run git lfs pull')
    # Before the check for pickles: the length at the start of a .safetensors file can begin with their bytes.
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _LONGEST_HEADER:
        return 'safetensors'
    if head[:1] == b'\x80' or b'\n' in head[:64] and head[:1] in b'(cl':
        raise UserError(f'{path} is a plain pickle or a torch file of before version 1.6. Opening those can '
                        'run code from the file, so they are not read. If you trust it, load it in PyTorch '
                        'and save its weights again with torch.save')
    if path.suffix == '.safetensors':
        return 'safetensors'
    raise UserError(f'{path} is no checkpoint (.safetensors or of torch.save): it starts with {head[:16]!r}')


def _open_folder(path: Path, weights: str) -> Source:
    """A diffusers pipeline folder (with transformer/) or the transformer's own folder."""
    folder = path / 'transformer' if (path / 'transformer').is_dir() else path
    source, config_path = open_weights(folder, weights), folder / 'config.json'
    if not config_path.is_file():
        raise UserError(f'{folder} has weights but no config.json; give the weight file itself '
                        f'({source.files[0]}) or add the config.json of the diffusers model')
    source.files = (*source.files, config_path)
    source.hub_config = parse_json(config_path.read_text(), str(config_path))
    check_hub_config(source.hub_config, str(config_path))
    source.classes = _class_names(path / 'model_index.json')
    return source


def _hub_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files of a diffusers folder, and the tensor names in its index."""
    for stem in _HF_STEMS:
        for suffix in ('.safetensors', '.bin'):
            if (folder / f'{stem}{suffix}').is_file():
                return [folder / f'{stem}{suffix}'], []
            if (index := folder / f'{stem}{suffix}.index.json').is_file():
                names = parse_json(index.read_text(), str(index)).get('weight_map', {})
                # Only the names: an index must not lead out of its folder.
                return [folder / Path(file).name for file in sorted(set(names.values()))], list(names)
            if shards := sorted(folder.glob(f'{stem}-?????-of-?????{suffix}')):
                return shards, []
    return [], []


def _class_names(path: Path) -> list[str] | None:
    """The label names of a diffusers DiT pipeline, if complete."""
    if not path.is_file():
        return None
    labels = parse_json(path.read_text(), str(path)).get('id2label') or {}
    names = [labels.get(str(i)) for i in range(len(labels))]
    return names if names and all(isinstance(name, str) for name in names) else None


def parse_json(text: str | bytes, where: str) -> dict:
    """A JSON object, or a UserError that names `where`."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f'{where} is not readable JSON: {error}') from error
    if not isinstance(content, dict):
        raise UserError(f'{where} holds a {type(content).__name__}, expected a JSON object')
    return content
