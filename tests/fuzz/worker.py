"""One process of a campaign: damages files case after case, reads them, and says how each case ended.

    python -m fuzz.worker SCRATCH KIND SEED FIRST LAST       (a line of JSON before and after each case)

Nothing that a file holds may be executed: an audit hook reports programs, processes, connections, pickled
classes, and files opened for writing outside of SCRATCH."""
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

MEMORY = 1 << 30            # more than before a case began
ADDRESSES = 6 << 30         # more than before the first case: an allocation beyond them is refused
LONGEST = 4000              # characters of a message
EXCEPTIONS = re.compile(r'\b(?!UserError)(?:[A-Z][a-z]+)+(?:Error|Exception|Warning)\b')
_NEVER = {'os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.forkpty', 'pty.spawn',
          'socket.connect', 'pickle.find_class', 'os.putenv', 'os.kill'}


class Audit:
    """What happened while `on` that reading a file never needs."""

    def __init__(self, scratch: Path):
        self.on, self.seen, self._scratch = False, [], str(scratch)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args) -> None:
        if not self.on or event not in ('exec', 'open', 'import') and event not in _NEVER:
            return
        if event == 'exec':
            file = getattr(args[0], 'co_filename', '?')
            if file.startswith('<frozen') or os.path.exists(file) or file.startswith('<'):
                return          # modules that are imported late, and classes that the library makes
        elif event == 'import':
            if args[0] != 'fuzz_canary':
                return
        elif event == 'open':
            path, _, mode = args
            if not isinstance(path, str | bytes) or not (mode or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            path = os.path.abspath(os.fsdecode(path))
            if path.startswith((self._scratch, '/dev/', '/proc/')) or '__pycache__' in path:
                return
        self.seen.append(f'{event} {args!r:.200}')


class Logged(logging.Handler):
    """What lit_jax logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def facts(value, depth=0):
    """Anything that a reader returns as text that is equal for equal values."""
    import numpy as np
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        value = np.asarray(value)
        return [str(value.dtype), list(value.shape), hashlib.sha1(np.ascontiguousarray(value)).hexdigest()]
    if isinstance(value, dict):
        return {str(key): facts(value[key], depth + 1) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [facts(one, depth + 1) for one in value]
    if isinstance(value, bytes):
        return hashlib.sha1(value).hexdigest()
    if hasattr(value, '__dataclass_fields__'):
        return {name: facts(getattr(value, name), depth + 1) for name in value.__dataclass_fields__}
    return repr(value)


def peak(reset: bool = False) -> int:
    """Bytes of this process: the most since the last reset."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    status = Path('/proc/self/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10


def message_faults(text: str, names: tuple[str, ...]) -> list[str]:
    """What is wrong with the message of an error."""
    found = []
    if not any(name in text for name in names):
        found.append('no file named')
    if not text.replace('\n', '').isprintable():
        found.append('not printable')
    if len(text) > LONGEST:
        found.append(f'{len(text)} characters')
    if said := EXCEPTIONS.search(text):
        found.append(f'names {said[0]}')
    return found


class Cases:
    """The cases of one kind."""

    def __init__(self, kind, scratch: Path, audit: Audit, logged: Logged):
        from fuzz.mutations import copy
        self.kind, self.audit, self.logged, self.folder = kind, audit, logged, scratch / 'valid'
        self.work = scratch / 'work'
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.input = kind.make(self.folder)
        for _ in range(2):              # what is imported or compiled late is there afterwards
            shutil.rmtree(self.work, ignore_errors=True)
            copy(self.input, self.work / self.input.name)
            self.right = facts(kind.read(self.work / self.input.name, self.folder))
        self.others = [facts(value) for value in kind.also(self.input, self.folder)]

    def run(self, rng) -> dict:
        """One case: what was done, how it ended, what is wrong with that."""
        from fuzz.mutations import copy

        from lit_jax.runtime.errors import UserError
        shutil.rmtree(self.work, ignore_errors=True)
        path = self.work / self.input.name
        copy(self.input, path)
        done = self.kind.mutate(path, rng)
        said = {'did': f'{done.file}: {done.what}'}
        self.audit.seen.clear(), self.logged.lines.clear()
        before, began = peak(reset=True), time.process_time()
        self.audit.on = not self.kind.runs
        faults, stem = [], Path(done.file).name
        try:
            value = self.kind.read(path, self.folder)
        except UserError as error:
            said['ended'] = 'refused'
            faults = message_faults(str(error), (stem, str(path)) if self.kind.named else ('',))
            said['message'] = str(error)[:2000]
        except BaseException as error:      # a SystemExit or a panic of a library is a fault, too
            said['ended'] = 'raised'
            faults = [f'raised {type(error).__name__}']
            said['message'] = ''.join(traceback.format_exception(error)[-6:])[-2500:]
        else:
            same = (found := facts(value)) == self.right or found in self.others
            said['ended'] = 'right' if same else 'other values'
            if not same and (self.kind.guard == 'whole' or self.kind.guard == 'bytes' and done.damaged):
                faults = ['wrong values']
        finally:
            self.audit.on = False
        grown = peak() - before
        if grown > MEMORY:
            faults.append(f'{grown >> 20} MiB')
        if time.process_time() - began > 20:
            faults.append(f'{time.process_time() - began:.0f} s')
        if self.audit.seen:
            faults.append(f'executed {self.audit.seen[0]}')
        for line in self.logged.lines:
            faults += [f'log: {fault}' for fault in message_faults(line, ('',))]
            said['log'] = line[:300]
        return {**said, 'faults': faults}


def main(scratch: str, name: str, seed: str, first: str, last: str) -> None:
    from fuzz.kinds import all_kinds
    from fuzz.mutations import seeded
    scratch = Path(scratch).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ['LIT_JAX_CACHE'] = str(scratch / 'cache')
    warnings.simplefilter('ignore')
    audit, logged = Audit(scratch), Logged()
    logging.getLogger('lit_jax').addHandler(logged)
    logging.getLogger('lit_jax').propagate = False
    logging.getLogger('absl').setLevel(logging.ERROR)
    with open(scratch / 'cases.jsonl', 'a', buffering=1) as log:
        cases = Cases(all_kinds()[name], scratch, audit, logged)
        addresses = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES, resource.RLIM_INFINITY))
        for case in range(int(first), int(last)):
            log.write(json.dumps({'begins': case}) + '\n')
            said = cases.run(seeded(int(seed), name, case))
            if said['faults']:
                shutil.rmtree(kept := scratch / 'faults' / str(case), ignore_errors=True)
                shutil.copytree(cases.work, kept, symlinks=True)
            log.write(json.dumps({'case': case, **said}) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
