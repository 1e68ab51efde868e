"""Local and remote paths alike: `runs/lit_xl` and `gs://bucket/runs/lit_xl`.

Every folder given by a user becomes a path here, once, with `as_path`. On a disk a file is written under a
temporary name, fsynced and renamed; in an object store it is one object: both ways it is whole or absent."""
import contextlib
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import fsspec
from etils import epath

from lit_jax.runtime.errors import UserError

# Scheme -> (the fsspec file system that etils opens for it, the package that has it).
_SCHEMES = {'gs': ('gcs', 'gcsfs'), 's3': ('s3', 's3fs'), 'az': ('az', 'adlfs'),
            'hf': ('hf', 'huggingface_hub')}
_BLOCK = 1 << 24
_URL = re.compile(r'^([A-Za-z][A-Za-z0-9+.-]*)://')
_BROKEN_URL = re.compile(rf'^({"|".join(_SCHEMES)}):/(?!/)')
# Other errors than OSError (no credentials, no network), raised by these packages if they are loaded.
_STORE_ERRORS = (('google.auth.exceptions', 'GoogleAuthError'), ('gcsfs.retry', 'HttpError'),
                 ('aiohttp', 'ClientError'), ('botocore.exceptions', 'BotoCoreError'))


def as_path(path) -> epath.Path:
    """Any path (text, pathlib, etils) as an `epath.Path`. A relative local one stays relative.

    Raises UserError for an unknown scheme, a missing package, and `gs:/bucket` (pathlib drops a slash)."""
    text = os.fspath(path)
    if broken := _BROKEN_URL.match(text):
        raise UserError(f'{text} is neither a local path nor a bucket; write a bucket as '
                        f'{broken[1]}://BUCKET/PATH, with two slashes.')
    if is_remote(text):
        _check_scheme(text)
    return epath.Path(text)


def is_remote(path) -> bool:
    """Whether a path is in an object store: no free space, no fsync, no renaming of folders."""
    return _URL.match(os.fspath(path)) is not None


def absolute(path) -> epath.Path:
    """`as_path`, absolute if it is local."""
    path = as_path(path)
    return path if is_remote(path) else epath.Path(Path(path).absolute())


def local_path(path) -> Path:
    """The local path of a PyTorch file. Raises UserError for a remote one."""
    if is_remote(as_path(path)):
        raise UserError(f'{path}: PyTorch files are read and written locally only. Give a local path, and '
                        'copy the file from or to the bucket (gs://: gcloud storage cp).')
    return Path(path)


def cache_folder() -> Path:
    """Folder for what can be made again: $LIT_JAX_CACHE, else ~/.cache/lit_jax."""
    return Path(os.environ.get('LIT_JAX_CACHE') or '~/.cache/lit_jax').expanduser()


def files_under(root) -> dict[str, int]:
    """{relative path with '/': bytes} of all files below a folder, sorted, in one listing; {} without one."""
    root = as_path(root)
    if is_remote(root):
        store, top = fsspec.url_to_fs(os.fspath(root))
        found = {name.removeprefix(top + '/'): entry['size']
                 for name, entry in store.find(top, detail=True).items()}
    else:
        files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        found = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(found.items()))


def file_sha256(path) -> str:
    """Hex digest of a local or remote file."""
    path, digest = as_path(path), hashlib.sha256()
    with explain_unreachable(path), path.open('rb') as file:
        if not is_remote(path):
            return hashlib.file_digest(file, 'sha256').hexdigest()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_bytes_atomic(path, data: bytes) -> None:
    """Writes a file into an existing folder; readers see the old content or the new, also after a crash."""
    path = as_path(path)
    if is_remote(path):
        path.write_bytes(data)
    else:
        with open_whole(path) as file:
            file.write(data)


@contextlib.contextmanager
def open_whole(path):
    """A file to write bytes into. It appears when the block ends, and not at all if the block fails."""
    if is_remote(path):
        try:
            with path.open('wb') as file:
                yield file
        except BaseException:
            path.unlink(missing_ok=True)     # closing the file stored the part that was written
            raise
        return
    temporary = path.with_name(f'.{path.name}.partial')
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_text_atomic(path, text: str) -> None:
    """`write_bytes_atomic` of text in UTF-8."""
    write_bytes_atomic(path, text.encode())


def fsync_path(path) -> None:
    """Fsyncs a local file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path) -> None:
    """Deletes a folder with its content, or a file, as far as possible; never raises."""
    path = as_path(path)
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError, *_loaded_store_errors()):
            path.rmtree(missing_ok=True)


def check_reachable(path) -> None:
    """Raises UserError if the bucket of a remote path does not exist or refuses. The path need not exist."""
    if not is_remote(path):
        return
    with explain_unreachable(path):
        try:
            if not as_path(path).exists():
                files_under(path)  # lists nothing, but fails if there is no such bucket
        except FileNotFoundError as error:
            raise UserError(f'{path}: there is no such bucket ({error}). Create it (gs://: gcloud storage '
                            'buckets create), or correct its name.') from error


@contextlib.contextmanager
def explain_unreachable(path):
    """Turns errors of object stores, except for missing files, into a UserError that names the path."""
    try:
        yield
    except (UserError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
        raise
    except (OSError, *_loaded_store_errors()) as error:
        if not is_remote(path):
            raise
        raise UserError(f'{path} cannot be reached: {type(error).__name__}: {error}. Check the name of the '
                        'bucket, the network, and the permissions of this machine (gs://: of its service '
                        'account, or gcloud auth application-default login).') from error


@contextlib.contextmanager
def explain_unreadable(path, what: str = ''):
    """`explain_unreachable`, and a UserError (ending with `what`) for a file that cannot be read."""
    try:
        with explain_unreachable(path):
            yield
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}{what}') from error


def _loaded_store_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _STORE_ERRORS
                 if module in sys.modules)


def _check_scheme(text: str) -> None:
    scheme = text.partition('://')[0]
    if scheme not in _SCHEMES:
        known = ', '.join(f'{name}://' for name in _SCHEMES)
        raise UserError(f'{text}: {scheme}:// is not supported; known: {known} and local paths.')
    file_system, package = _SCHEMES[scheme]
    # No cached listings: other processes, and TensorStore in this one, write files all the time.
    fsspec.config.conf.setdefault(file_system, {}).setdefault('use_listings_cache', False)
    try:
        fsspec.get_filesystem_class(file_system)
    except ImportError as error:
        command = 'pip install "lit_jax[gcs]"' if scheme == 'gs' else f'pip install {package}'
        raise UserError(f'{text}: {scheme}:// needs the package {package} ({error}). Install it on every '
                        f'host of the run: {command}') from error
