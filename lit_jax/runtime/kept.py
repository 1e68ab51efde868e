"""Files in the cache folder that can be made again: facts about a data set that take long to read off it."""
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

LOG = logging.getLogger('lit_jax')


def load_kept(path: Path, load: Callable):
    """What `keep` wrote; None where it is not there, or damaged."""
    try:
        with open(path, 'rb') as file:
            return load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        LOG.warning('%s cannot be read (%s); it is made again', path, error)
        return None


def keep(path: Path, save: Callable) -> None:
    """Writes a file beside its name and renames it; without room or permission it is made again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            save(file)
        os.replace(file.name, path)
    except OSError as error:
        LOG.warning('%s cannot be written, what it would hold is made again next time: %s', path, error)
