"""A cache of facts about data sets that take long to compute."""
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lit_jax.runtime.errors import reason_of
from lit_jax.runtime.npz_reader import DAMAGE
from lit_jax.runtime.paths import cache_folder

LOG = logging.getLogger('lit_jax')
_SEAL = 32      # bytes


def keep_facts(kind: str, identity: str, suffix: str, *, make: Callable[[Path], object], load: Callable,
               save: Callable, fits: Callable[[object], bool] = lambda value: True):
    """The cached value of `identity`, else `make(path of the cache file)`, which is then saved.

    A damaged file, or that of another identity, is made again; where the cache cannot be written, the value
    is made each time. A file ends with the sha256 of its identity and of what stands before.

    Args:
        kind: subfolder of the cache. identity: equal texts stand for equal values.
        load, save: load(file) -> value, save(file, value). fits: whether a loaded value is plausible."""
    digest = hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()
    path = cache_folder() / kind / f'{digest[:32]}{suffix}'
    try:
        stored = path.read_bytes()
        content = stored[:-_SEAL]
        if stored[-_SEAL:] != _seal(identity, content):
            raise ValueError('its content is not what was written')
        if fits(value := load(io.BytesIO(content))):
            return value
    except FileNotFoundError:
        pass
    except DAMAGE as error:
        LOG.warning('%s cannot be read (%s); it is made again', path, reason_of(error))
    value = make(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as new:
            try:
                made = io.BytesIO()
                save(made, value)
                new.write(made.getvalue() + _seal(identity, made.getvalue()))
                new.flush()
                os.replace(new.name, path)
            except BaseException:
                os.unlink(new.name)
                raise
    except OSError as error:
        LOG.warning('%s cannot be written (%s); it is made again next time', path, reason_of(error))
    return value


def _seal(identity: str, content: bytes) -> bytes:
    return hashlib.sha256(identity.encode(errors='surrogateescape') + b'\0' + content).digest()
