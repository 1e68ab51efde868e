"""Tells other people's checkpoints from our folders, for messages: they are converted first."""
import re
import shlex

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.paths import as_path

_FILES = re.compile(r'\.(pt|pth|ckpt|bin|safetensors|pickle)$')
_HUB_FIELDS = ('_class_name', 'model_type')      # in config.json of diffusers and transformers
_PARTS = ('transformer', 'vae', 'text_encoder')


def conversion_hint(path) -> str:
    """' It is a PyTorch checkpoint; convert it first: ...' for a file or folder that the converter reads; ''
    for anything else."""
    path = as_path(path)
    if path.is_file() and _FILES.search(path.name.lower()):
        return _hint('a PyTorch checkpoint', path)
    if not path.is_dir():
        return ''
    parts = [path / part for part in _PARTS if (path / part / 'config.json').is_file()]
    if (path / 'model_index.json').is_file() and parts:
        return _hint('a pipeline of diffusers; its networks are converted one by one', *parts)
    if _is_hub(path):
        return _hint('a folder of Hugging Face', path)
    weights = sorted(entry for entry in path.iterdir()
                     if entry.is_file() and _FILES.search(entry.name.lower()))
    if weights and not (path / 'config.json').exists():
        return _hint('a folder with PyTorch checkpoints', weights[-1])
    return ''


def _is_hub(path) -> bool:
    """Whether config.json is that of another library."""
    try:
        content = parse_json((path / 'config.json').read_bytes(), 'config.json', dict)
    except (OSError, UserError):
        return False
    return any(field in content for field in _HUB_FIELDS) and 'kind' not in content


def _hint(what: str, *sources) -> str:
    commands = '; '.join(f'python convert_torch_ckpt.py {shlex.quote(str(source))} --out models/'
                         f'{shlex.quote(_name(source))}' for source in sources)
    return f' It is {what}; convert it first: {commands}'


def _name(source) -> str:
    """A name for the converted folder."""
    path = as_path(source)
    stem = re.sub(r'(\.[A-Za-z]+)+$', '', path.name) if path.is_file() else path.name
    return f'{path.parent.name}_{stem}' if stem in _PARTS and path.parent.name else stem or 'mine'
