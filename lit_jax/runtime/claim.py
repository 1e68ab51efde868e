"""Claims of what is being written, so that no two commands write one folder at once.

A claim is a small file, `.claim` in a folder or `.NAME.claim` beside an output: host, process, since when.
Its process touches it every 20 seconds, and removes it when it ends. One left by a killed process is taken
over: at once in the same place (host and container), elsewhere when nobody has touched it for two minutes. A
process that was silent for so long finds its claim taken at the next `check`, and stops.

In buckets of Google and Amazon a claim is an object, created and replaced on the condition that nobody else
did so; other stores have no such condition, and no claims."""
import contextlib
import errno
import functools
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lit_jax.runtime import peers, signals, writers
from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.hub import refuse_output
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.paths import (
    absolute,
    check_has_name,
    check_reachable,
    explain_unwritable,
    is_remote,
    make_folder,
)
from lit_jax.runtime.progress import working

FILE = '.claim'
LOG = logging.getLogger('lit_jax')
STALE_SECONDS = 120.0      # without a touch, a process elsewhere counts as gone
_TOUCH_SECONDS = 20.0
_LOOK_SECONDS = 1.0        # between two looks at a claim that may be left over
_ANSWER_SECONDS = 30.0     # for a request to a bucket
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
             errno.EXDEV, errno.EMLINK)
_TROUBLE = (OSError, ValueError, RuntimeError)      # of disks and of TensorStore
_SHAPE = {'host': str, 'place': str, 'pid': int, 'started': str, 'since': str, 'token': str}
_UNREADABLE = {'host': 'an unknown host', 'place': '', 'pid': 0, 'started': '', 'since': 'an unknown time',
               'token': ''}
_BUCKET = re.compile(r'(gs|s3)://([^/]+)/?(.*)')
_held: dict[str, '_Claim'] = {}      # by place: the claims of this process


@contextlib.contextmanager
def claimed(path, *, inside: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds the claim of an output while the block runs; UserError if a live process has it.

    All processes of a run call it together: process 0 holds the claim for all of them. inside: the claim
    lies in the folder `path`, which is created, and not beside it. wait: for the other process to end. A
    process may claim again what it has."""
    path, ours = absolute(path), []
    peers.only_lead(lambda: ours.extend(_acquire(path, inside, wait)))
    try:
        yield
    finally:
        for claim in ours:
            claim.release()


def claims_out(function: Callable) -> Callable:
    """A function of (source, out, ...) that holds the claim of `out`, if it is local."""
    @functools.wraps(function)
    def claiming(src, out, *args, **kwargs):
        refuse_output(out)
        with contextlib.nullcontext() if is_remote(out) else claimed(out):
            return function(src, out, *args, **kwargs)

    return claiming


def check() -> None:
    """UserError if a claim of this process was taken over. Call before writing what others may read."""
    for claim in list(_held.values()):
        claim.check()


def is_lost() -> bool:
    """Whether a claim of this process was found taken over."""
    return any(claim.taken_by for claim in _held.values())


def _acquire(path, inside: bool, wait: bool) -> list['_Claim']:
    """[our new claim], or [] where this process has it already or the store knows no claims."""
    if not inside:
        check_has_name(path)
    if is_remote(path):
        check_reachable(path)
        if not _BUCKET.match(os.fspath(path)):
            return []
        place: _Bucket | _Disk = _Bucket(path / FILE if inside else path.with_name(f'.{path.name}{FILE}'))
    else:
        path = Path(os.path.realpath(path))
        place = _Disk(path / FILE if inside else path.with_name(f'.{path.name}{FILE}'))
    if str(place) in _held:
        return []
    claim = _Claim(path, place)
    try:
        with explain_unwritable(path):
            claim.acquire(wait)
    except UserError:
        raise
    except _TROUBLE as error:
        if not is_remote(path):
            raise
        LOG.warning('%s cannot be claimed (%s); see to it that no other command writes there', path,
                    reason_of(error))
        return []
    if not is_remote(path):
        for kind in ('partial', 'trial'):
            writers.remove_siblings(path, kind)
        writers.remove_leftovers(path)
    return [claim]


class _Claim:
    """The claim of one output by this process."""

    def __init__(self, path, place: '_Disk | _Bucket'):
        self.path, self.place = path, place
        self.mine = {**writers.this_process()._asdict(), 'since': time.strftime('%Y-%m-%d %H:%M:%S'),
                     'token': secrets.token_hex(8)}
        self.taken_by: dict | None = None
        self._looked, self._looking, self._ended = time.time(), threading.Lock(), threading.Event()

    def acquire(self, wait: bool) -> None:
        seen, since, tries, said = None, time.monotonic(), 0, False
        while not self.place.create(self.mine):
            if (found := self.place.read()) is None:      # released in between, or a dead link
                tries += 1
                if tries > 5:
                    raise UserError(f'{self.place} cannot be read; delete it')
                time.sleep(_LOOK_SECONDS / 5)
                continue
            other, stamp, age = found
            who = _described(other)
            runs = writers.Writer(*(other[name] for name in writers.Writer._fields)).runs()
            if runs is None:      # it cannot be seen from here: does it touch its claim?
                quiet = time.monotonic() - since
                touched, seen = seen not in (None, stamp), stamp
                if touched:
                    runs, since = True, time.monotonic()
                elif max(age, quiet) > STALE_SECONDS:
                    runs = False
            if runs and not wait:
                raise UserError(f'{self.path} is in use: {who} has been writing there since '
                                f'{shown(other["since"])}. Wait for it, stop it, or choose another place. '
                                f'(If it is gone for certain, delete {self.place}.)')
            if runs is False:
                if self.place.take(other, self.mine):
                    LOG.warning('%s: taken over from %s, which is gone', self.path, who)
                    break
                continue
            if not said:
                said = True
                LOG.info('%s is claimed by %s: waiting %s', self.path, who, 'for its end' if runs else
                         f'up to {STALE_SECONDS - age:.0f} s to see whether it still writes')
            with working(f'waiting for {who}'):
                time.sleep(_LOOK_SECONDS)
        _held[str(self.place)] = self
        signals.begun()
        threading.Thread(target=self._keep, daemon=True, name='claim').start()

    def _keep(self) -> None:
        while not self._ended.wait(_TOUCH_SECONDS):
            self._look()

    def _look(self) -> None:
        """Touches the claim, and notes who has taken it."""
        with self._looking, contextlib.suppress(*_TROUBLE):      # what cannot be reached now may be later
            if not self._ended.is_set():
                # After a longer sleep another process may have come and gone.
                awake = time.time() - self._looked < STALE_SECONDS
                self.taken_by = self.taken_by or self.place.touch(self.mine, awake)
                self._looked = time.time()

    def check(self) -> None:
        if not is_remote(self.path) or time.time() - self._looked > 2 * _TOUCH_SECONDS:
            self._look()
        if other := self.taken_by:
            raise UserError(
                f'{self.path} belongs to {_described(other)} now, which took it over at '
                f'{shown(other["since"])}: this one was silent for {STALE_SECONDS:.0f} s, or its claim was '
                'deleted. It writes nothing more there')

    def release(self) -> None:
        self._ended.set()
        _held.pop(str(self.place), None)
        if self.mine['pid'] == os.getpid():      # and not in a fork of the process that claimed
            with self._looking, contextlib.suppress(*_TROUBLE):
                self.place.remove(self.mine)


def _release_all() -> None:
    for claim in list(_held.values()):
        claim.release()


signals.before_leaving(_release_all)


class _Disk:
    """A claim as a local file."""

    def __init__(self, file: Path):
        self._file = file
        self._now = 0.0                    # by the clock of the disk, which may be that of another machine
        self._made: list[Path] = []        # folders that were created for the claim

    def __str__(self) -> str:
        return str(self._file)

    def create(self, mine: dict) -> bool:
        """False where there is a claim."""
        folders = [one for one in self._file.parents if not one.exists()]
        make_folder(self._file.parent)
        self._made += folders
        own, text = writers.sibling(self._file, 'partial'), json.dumps(mine)
        try:
            own.write_text(text)
            self._now = own.stat().st_mtime
            return self._put(own, text)
        finally:
            own.unlink(missing_ok=True)

    def _put(self, own: Path, text: str) -> bool:
        """Puts a file in the place of the claim, with its content or not at all, unless there is one."""
        try:
            os.link(own, self._file)
        except FileExistsError:
            return own.stat().st_nlink == 2      # a network disk that answered twice
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                new = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            with open(new, 'w') as file:
                file.write(text)
        return True

    def read(self, file: Path | None = None) -> tuple[dict, object, float] | None:
        """(who has it, something that changes with each touch, seconds since then); None without a claim."""
        file = file or self._file
        try:
            with open(file, 'rb') as opened:
                touched, data = os.fstat(opened.fileno()), opened.read()
        except FileNotFoundError:
            return None
        except IsADirectoryError:
            raise UserError(f'{file} is a folder; a claim is written there. Move it away') from None
        return _parse(data, file), touched.st_mtime_ns, self._now - touched.st_mtime

    def take(self, other: dict, mine: dict) -> bool:
        """Replaces the claim of a process that is gone; False if another process was faster."""
        aside = writers.sibling(self._file, 'partial')
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._file, aside)
            if (found := self.read(aside)) and found[0]['token'] != other['token']:
                self._put(aside, json.dumps(found[0]))
            aside.unlink()
        return self.create(mine)

    def touch(self, mine: dict, again: bool) -> dict | None:
        """Who has the claim in our place, if another has. again: one that was deleted is made again."""
        if (found := self.read()) is None:
            if not again:
                return _UNREADABLE
            if self.create(mine):
                return None
            found = self.read()
        if found and found[0]['token'] not in ('', mine['token']):
            return found[0]
        os.utime(self._file)
        return None

    def remove(self, mine: dict) -> None:
        if (found := self.read()) and found[0]['token'] in ('', mine['token']):
            self._file.unlink()
        for folder in self._made:
            folder.rmdir()                 # an OSError, which ends it, where something was written


class _Bucket:
    """A claim as an object."""

    def __init__(self, path):
        self._name = os.fspath(path)
        scheme, bucket, key = _BUCKET.fullmatch(self._name).groups()
        folder, self._key = key.rpartition('/')[::2]
        self._store = open_bucket(scheme, bucket, f'{folder}/' if folder else '')
        self._generation = b''             # of the claim as it was last seen

    def __str__(self) -> str:
        return self._name

    def _read(self):
        found = self._store.read(self._key).result(timeout=_ANSWER_SECONDS)
        self._generation = found.stamp.generation
        return found

    def _write(self, mine: dict | None) -> bool:
        """Whether it was still as last seen; then it is ours now (None: gone)."""
        text = None if mine is None else json.dumps(mine)
        done = self._store.write(self._key, text, if_equal=self._generation).result(timeout=_ANSWER_SECONDS)
        self._generation = done.generation or self._generation
        return bool(done.generation)

    def create(self, mine: dict) -> bool:
        return self._read().state == 'missing' and self._write(mine)

    def read(self) -> tuple[dict, object, float] | None:
        found = self._read()
        return None if found.state == 'missing' else (
            _parse(found.value, self._name), found.stamp.generation, 0.0)

    def take(self, other: dict, mine: dict) -> bool:
        return self._write(mine)

    def touch(self, mine: dict, again: bool) -> dict | None:
        if self._write(mine):
            return None
        if (found := self.read()) is None:
            return None if again and self._write(mine) else _UNREADABLE
        return found[0] if found and found[0]['token'] not in ('', mine['token']) else None

    def remove(self, mine: dict) -> None:
        if (found := self.read()) and found[0]['token'] in ('', mine['token']):
            self._write(None)


def open_bucket(scheme: str, bucket: str, folder: str):
    """TensorStore's view of a folder of a bucket: writing under a condition, which fsspec does not have."""
    import tensorstore
    few = {'max_retries': 3}
    return tensorstore.KvStore.open({
        'driver': {'gs': 'gcs', 's3': 's3'}[scheme], 'bucket': bucket, 'path': folder,
        'context': {'gcs_request_retries': few, 's3_request_retries': few}}).result(timeout=_ANSWER_SECONDS)


def _described(said: dict) -> str:
    return f'process {said["pid"]} on {shown(said["host"])}' if said['pid'] else 'an unknown process'


def _parse(data: bytes, name) -> dict:
    try:
        return parse_json(data, name, _SHAPE)
    except ValueError:      # being written, damaged, or of another version
        return _UNREADABLE
