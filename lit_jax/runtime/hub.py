"""Names of models on the Hugging Face hub: `hf://OWNER/NAME` stands for a model wherever a folder does.

Which folder is read in its place, rooms above know: `open_with`."""
import functools
import re
from collections.abc import Callable
from pathlib import Path

from lit_jax.runtime.errors import UserError, shown_name

HUB = 'hf://'
_OTHER = ('hf://datasets/', 'hf://spaces/', 'hf://buckets/')      # files there, through fsspec
_PART = r'[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?'
_NAME = re.compile(rf'{_PART}/{_PART}')
_LONGEST = 96
_openers: list[Callable[[str], Path]] = []


def is_hub(path: str) -> bool:
    """Whether a path is meant as the name of a model on the hub."""
    return path.startswith(HUB) and not path.startswith(_OTHER)


def hub_name(text: str) -> str:
    """'OWNER/NAME' of 'hf://OWNER/NAME' or 'OWNER/NAME'; UserError for what is no name of the hub."""
    name = text.removeprefix(HUB).rstrip('/')
    if (not _NAME.fullmatch(name) or len(name) > _LONGEST or '..' in name or '--' in name
            or name.endswith('.git')):
        raise UserError(f'{shown_name(text)} is no name of a model on the hub; write OWNER/NAME, of letters, '
                        'digits, -, _ and . (hf://OWNER/NAME to load it)')
    return name


def open_with(function: Callable[[str], Path]) -> None:
    """function: 'OWNER/NAME' -> the folder that is read in its place."""
    _openers[:] = [function]


@functools.cache
def opened(text: str) -> Path:
    """The local folder of 'hf://OWNER/NAME'; downloads it where the cache has no newer one, once for a
    process."""
    name = hub_name(text)
    if not _openers:
        raise UserError(f'{text} is read by the commands of lit_jax and by lit_jax.load only')
    return _openers[0](name)


def refuse_output(path) -> None:
    """UserError for a model on the hub in the place of an output."""
    if is_hub(str(path)):
        raise UserError(f'{path} cannot be written: hf:// is for reading. Give a local folder, and upload it '
                        'with python push.py FOLDER OWNER/NAME')
