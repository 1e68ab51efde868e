"""Who writes: processes, told apart across hosts and containers, and names of files that are being written.

A process is known by its place (the boot of its machine, and the container whose process numbers it has), its
number there, and when it started: numbers are used again. `.NAME.partial.PLACE.NUMBER.STARTED` is what it
writes before that becomes NAME."""
import collections
import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from lit_jax.runtime import signals

_TEMPORARY = re.compile(r'\.(?P<target>.+)\.(?P<kind>partial|trial|old)\.(?P<place>[0-9a-f]{12})\.'
                        r'(?P<pid>[0-9]{1,9})\.(?P<started>\w*)')
_begun: collections.deque = collections.deque(maxlen=64)      # newest temporary names of this process


class Writer(NamedTuple):
    """A process that writes."""
    host: str
    place: str
    pid: int
    started: str

    def runs(self) -> bool | None:
        """Whether it still runs; None if it is not of this place, from where nobody can tell."""
        if self.place != _place():
            return None
        return bool(self.started) and _started(self.pid) == self.started


def this_process() -> Writer:
    return Writer(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()))


@functools.cache
def _place() -> str:
    """Equal for processes that see each other's numbers. Names of hosts alone may be equal in containers."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text()
        numbers = os.readlink('/proc/self/ns/pid')
    except OSError:
        boot, numbers = socket.gethostname(), ''
    return hashlib.sha256(f'{boot}\n{numbers}'.encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """When a process of this place began, in the words of its system; '' if there is none."""
    try:
        with open(f'/proc/{pid}/stat', 'rb') as file:
            fields = file.read().rpartition(b')')[2].split()
        return '' if fields[0] in (b'Z', b'X') else fields[19].decode()
    except OSError:
        if os.path.isdir('/proc/self'):
            return ''
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ''
    except OSError:
        pass
    return 'running'


def sibling(target: Path, kind: str) -> Path:
    """The name beside `target` that only this process uses; kind: 'partial' while it is written, 'trial' to
    try writing, 'old' while it is replaced."""
    _, place, pid, started = this_process()
    path = target.with_name(f'.{target.name}.{kind}.{place}.{pid}.{started}')
    if kind != 'old':
        _begun.append(path)
    if kind == 'partial':
        signals.begun()
    return path


def _remove_begun() -> None:
    for path in set(_begun):
        _remove(Path(path))


signals.before_leaving(_remove_begun)


def remove_siblings(target: Path, kind: str) -> None:
    """Deletes the siblings of `target` of this process, and of ended ones of this place."""
    mine = sibling(target, kind).name
    for path in target.parent.iterdir():
        if path.name == mine or _left_over(path.name) == (target.name, kind):
            _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Deletes what ended processes of this place were writing, in a folder and below it. (What they were
    replacing may be the only copy, and stays.)"""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (found := _left_over(name)) and found[1] != 'old':
                _remove(Path(parent, name))


def _left_over(name: str) -> tuple[str, str] | None:
    """(target, kind) of a temporary name whose process has ended."""
    found = _TEMPORARY.fullmatch(name)
    if found is None or Writer('', found['place'], int(found['pid']), found['started']).runs() is not False:
        return None
    return found['target'], found['kind']


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
