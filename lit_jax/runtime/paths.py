"""Local and remote paths alike: `runs/lit_xl` and `gs://bucket/runs/lit_xl`.

Every folder given by a user becomes a path here, once, with `as_path`. On a disk a file is written under a
temporary name, fsynced and renamed; in an object store it is one object: both ways it is whole or absent."""
import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import fsspec
from etils import epath

from lit_jax.runtime import hub, writers
from lit_jax.runtime.errors import UserError, human_bytes, reason_of, shown_name

# Scheme -> (the fsspec file system that etils opens for it, the package that has it).
_SCHEMES = {'gs': ('gcs', 'gcsfs'), 's3': ('s3', 's3fs'), 'az': ('az', 'adlfs'),
            'hf': ('hf', 'huggingface_hub')}
_BLOCK = 1 << 24
# A full disk, a full quota, and a file over the process's limit (`ulimit -f`).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Why a place cannot be written, and what to do about it.
_UNWRITABLE = {
    errno.EACCES: ('this user may not write there', 'Change its permissions, or choose another place.'),
    errno.EPERM: ('this user may not write there', 'Change its permissions, or choose another place.'),
    errno.EROFS: ('its disk is mounted read-only', 'Choose another place.'),
    errno.ENAMETOOLONG: ('its name is too long for this disk', 'Choose a shorter one.'),
    errno.ENOTDIR: ('a file stands where a folder is needed', 'Choose another place, or move that file.'),
    errno.EEXIST: ('something else stands there', 'Choose another place, or move it.'),
    errno.EISDIR: ('a folder stands where a file is to be written', 'Choose another name, or move it.'),
    errno.ELOOP: ('its links lead in a circle', 'Choose another place, or remove these links.'),
    errno.EIO: ('its disk reports an error', 'Check the disk, or choose another place.'),
    errno.ESTALE: ('its network disk is gone', 'Mount it again, or choose another place.')}
_URL = re.compile(r'^([A-Za-z][A-Za-z0-9+.-]*)://')
_BROKEN_URL = re.compile(rf'^({"|".join(_SCHEMES)}):/(?!/)')
# Other errors than OSError (no credentials, no network), raised by these packages if they are loaded.
_STORE_ERRORS = (('google.auth.exceptions', 'GoogleAuthError'), ('gcsfs.retry', 'HttpError'),
                 ('aiohttp', 'ClientError'), ('botocore.exceptions', 'BotoCoreError'))


def as_path(path) -> epath.Path:
    """Any path (text, pathlib, etils) as an `epath.Path`. A relative local one stays relative; a model on the
    hub (hf://OWNER/NAME) is the folder that was made of it.

    Raises UserError for an unknown scheme, a missing package, and `gs:/bucket` (pathlib drops a slash)."""
    text = os.fspath(path)
    if hub.is_hub(text):
        return epath.Path(hub.opened(text))
    if '\0' in text:
        raise UserError(f'{shown_name(text)} is no path: it holds a zero byte.')
    if broken := _BROKEN_URL.match(text):
        raise UserError(f'{text} is neither a local path nor a bucket; write a bucket as '
                        f'{broken[1]}://BUCKET/PATH, with two slashes.')
    if is_remote(text):
        _check_scheme(text)
    return epath.Path(text)


def check_no_pattern(path) -> None:
    """UserError for a local or remote path that holds `[`, `?` or `*`: Orbax takes the place where it writes
    arrays for a pattern, and could never read what it wrote."""
    text = os.fspath(absolute(path))
    if found := [sign for sign in '[?*' if sign in text]:
        raise UserError(f'arrays cannot be written to {text}: its name, or that of a folder above it, holds '
                        f'{" and ".join(found)}. Choose another place')


def check_has_name(path) -> None:
    """UserError for the root of a disk or bucket, beside which nothing can be written."""
    if not as_path(path).name:
        raise UserError(f'{path} is the root of a disk or bucket; give a folder or file below it')


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
    return Path(os.fspath(as_path(path)))


def cache_folder() -> Path:
    """Folder for what can be made again: $LIT_JAX_CACHE, else ~/.cache/lit_jax."""
    return Path(os.environ.get('LIT_JAX_CACHE') or '~/.cache/lit_jax').expanduser()


def files_under(root) -> dict[str, int]:
    """{relative path with '/': bytes} of all files below a folder, sorted, in one listing; {} without one.
    A link that leads to no file has -1 bytes: it is there, and never as long as what was written."""
    root = as_path(root)
    if is_remote(root):
        store, top = fsspec.url_to_fs(os.fspath(root))
        found = {name.removeprefix(top + '/'): entry['size']
                 for name, entry in store.find(top, detail=True).items()}
    else:
        files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        found = {path.relative_to(root).as_posix(): _bytes_of(path) for path in files}
    return dict(sorted(found.items()))


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:     # a dead link, or one that leads to itself
        return -1


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
    """Writes a file into an existing folder; readers see the old content or the new, also after a crash.
    UserError (`explain_unwritable`) where it cannot be written."""
    path = as_path(path)
    if is_remote(path):
        with explain_unreachable(path):
            path.write_bytes(data)
    else:
        with open_whole(path) as file:
            file.write(data)


@contextlib.contextmanager
def open_whole(path):
    """A file to write bytes into. It appears when the block ends, and not at all if the block fails.
    UserError (`explain_unwritable`) where it cannot be written."""
    with explain_unwritable(path), _open_whole(path) as file:
        yield file


@contextlib.contextmanager
def _open_whole(path):
    if is_remote(path):
        try:
            with path.open('wb') as file:
                yield file
        except BaseException:
            path.unlink(missing_ok=True)     # closing the file stored the part that was written
            raise
        return
    temporary = writers.sibling(path, 'partial')
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


def make_folder(path) -> epath.Path:
    """Creates a folder with its parents, where there is none. UserError where something is in the way."""
    path = as_path(path)
    with explain_unwritable(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise UserError(f'{_brief(path)} cannot be made: a link above it leads to nothing, or its disk '
                            'takes no folders. Choose another place, or remove this link.') from error
    return path


def prepare_folder(path) -> epath.Path:
    """Creates a folder with its parents and tries writing in it; to be called before work is done for it.
    Returns its path; UserError where it cannot be written."""
    path = as_path(path)
    with explain_unwritable(make_folder(path)):
        _try_writing(path, '')
    check_reachable(path)
    return path


def prepare_place(path) -> epath.Path:
    """`prepare_folder` for the folder of something that will be written whole, under a longer temporary name
    first. What is there already stays as it is."""
    path = as_path(path)
    check_has_name(path)
    prepare_folder(path.parent)
    with explain_unwritable(path):
        _try_writing(path.parent, f'.{path.name}')
    return path


def prepare_file(path) -> epath.Path:
    """`prepare_place` of a file; UserError also where a folder is in its place."""
    path = prepare_place(path)
    with explain_unwritable(path):
        if not is_remote(path) and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return path


def _try_writing(folder: epath.Path, name: str) -> None:
    if not is_remote(folder):
        trial = Path(writers.sibling(folder / (name or 'claim'), 'trial'))
        try:
            trial.write_bytes(b'0')
        finally:
            trial.unlink(missing_ok=True)


def remove_tree(path) -> None:
    """Deletes a folder with its content, a file or a link, as far as possible; never raises."""
    path = as_path(path)
    if not is_remote(path):
        if Path(path).is_symlink() or Path(path).is_file():
            with contextlib.suppress(OSError):
                Path(path).unlink()
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


def check_folder(path, said: str) -> None:
    """`check_reachable`, and a UserError where a file or a link to nothing stands in the place of a folder or
    of one above it. Makes nothing. said: how the command was told, for the message: '--out=runs/a'."""
    path = as_path(path)
    for one in () if is_remote(path) else (path, *path.parents):
        if one.is_file() or os.path.islink(one) and not one.is_dir():
            found = 'a file' if one.is_file() else 'a link to nothing'
            raise UserError(f'{said}: {one} is {found}, where a folder is needed; give another place')
    check_reachable(path)


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
        raise UserError(f'{path} cannot be reached: {reason_of(error)}. Check the name of the bucket, the '
                        'network, and the permissions of this machine (gs://: of its service account, or '
                        'gcloud auth application-default login).') from error


@contextlib.contextmanager
def explain_unreadable(path, what: str = ''):
    """`explain_unreachable`, and a UserError (ending with `what`) for a file that cannot be read."""
    try:
        with explain_unreachable(path):
            yield
    except OSError as error:
        raise UserError(f'{path} cannot be read: {reason_of(error)}{what}') from error


@contextlib.contextmanager
def explain_unwritable(path, needed: int | None = None):
    """Turns what keeps a local path from being written into a UserError that names it: no permission, a
    read-only or full disk, a name too long, a file in the place of a folder, links in a circle. Other errors,
    and those of files elsewhere, pass; for remote paths `explain_unreachable`. needed: bytes, if known."""
    try:
        with explain_unreachable(path):
            yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        code = None if is_remote(path) else _error_code(error)
        if code in _FULL:
            raise full_disk_error(path, needed, os.strerror(code)) from error
        if code not in _UNWRITABLE or not _concerns(error, path):
            raise
        why, what_to_do = _UNWRITABLE[code]
        raise UserError(f'{_brief(path)} cannot be written: {why}. {what_to_do}') from error


def full_disk_error(path, needed: int | None, cause: str) -> UserError:
    """For a local path that does not fit; needed: bytes, if known."""
    needs = '' if needed is None else f'it needs about {human_bytes(needed)}, and '
    return UserError(f'no room to write {_brief(path)}: {needs}{human_bytes(free_bytes(path))} are free on '
                     f'that disk ({cause}). Nothing half-written was kept. Free some space, or choose '
                     'another place, and run the same command again.')


def free_bytes(path) -> int:
    """Of the disk that holds, or will hold, a local path."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _error_code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # TensorStore raises a ValueError with the error code in its text.
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(found[1])
    return next((code for code in _FULL if os.strerror(code) in str(error)), None)


def _concerns(error: BaseException, path) -> bool:
    """Whether an error is about a path, something beside or below it, or a folder above it."""
    if not isinstance(name := getattr(error, 'filename', None), str | os.PathLike):
        return True
    met, path = Path(os.path.abspath(name)), Path(os.path.abspath(path))
    return met.is_relative_to(path.parent) or path.is_relative_to(met)


def _brief(path) -> str:
    """A path as it is, if no name in it is longer than a disk allows."""
    text = os.fspath(path)
    return text if all(len(os.fsencode(name)) < 256 for name in text.split(os.sep)) else shown_name(text)


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
