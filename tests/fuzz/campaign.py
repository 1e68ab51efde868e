"""Damages thousands of files in worker processes and lists what went wrong.

    PYTHONPATH=.:tests python -m fuzz.campaign --cases=10000 --seed=1 [--kinds='latents,npz set']
    PYTHONPATH=.:tests python -m fuzz.campaign --kinds='npz set' --seed=1 --case=17      one case again

Good ends of a case: the values of the undamaged files, other values where nothing in the file could tell
(`kinds.Kind.guard`), or one short, printable message that names the file. All else is a fault; its files stay
in OUT/KIND/faults/CASE (OUT: runs/fuzz). A worker that dies or hangs is started again behind that case."""
import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 120      # seconds for one case, and for making the valid files


def run(cases: int, seed: int, out: Path, kinds: list[str] | None = None,
        jobs: int = 2) -> dict[str, list[dict]]:
    """{kind: what its cases said}, `cases` in all, divided by weight."""
    weights = {name: weight for name, weight in _weights().items() if not kinds or name in kinds}
    share = cases / sum(weights.values())
    waiting = [(name, 0, max(1, round(share * weight))) for name, weight in weights.items()]
    running, said = [], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Worker(out, seed, *waiting.pop(0)))
            time.sleep(0.1)
            for worker in [worker for worker in running if worker.ended()]:
                running.remove(worker)
                said.setdefault(worker.name, []).extend(worker.cases())
                if worker.first < worker.last:
                    waiting.insert(0, (worker.name, worker.first, worker.last))
    finally:
        for worker in running:
            worker.process.kill()
    return said


class _Worker:
    """A process that runs cases first..last of a kind; `ended` moves `first` behind what it did."""

    def __init__(self, out: Path, seed: int, name: str, first: int, last: int):
        self.name, self.seed, self.first, self.last = name, seed, first, last
        self.scratch = out / name.replace(' ', '_')
        (self.scratch / 'cases.jsonl').unlink(missing_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._began, self._size, self._hung = time.monotonic(), 0, False
        with open(self.scratch / 'printed.txt', 'wb') as printed:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'fuzz.worker', self.scratch, name, *map(str, (seed, first, last))],
                cwd=TESTS.parent, env=_environment(), stdin=subprocess.DEVNULL, stdout=printed,
                stderr=subprocess.STDOUT)

    def ended(self) -> bool:
        if self.process.poll() is not None:
            return True
        log = self.scratch / 'cases.jsonl'
        size = log.stat().st_size if log.exists() else 0
        if size != self._size:
            self._began, self._size = time.monotonic(), size
        if time.monotonic() - self._began > PATIENCE:
            self._hung = True
            self.process.kill()
            self.process.wait()
        return self._hung

    def cases(self) -> list[dict]:
        log, found, open_case = self.scratch / 'cases.jsonl', [], None
        for line in log.read_text().splitlines() if log.exists() else ():
            line = json.loads(line)
            open_case = line.get('begins')
            if 'case' in line:
                found.append(line)
        if self._hung or self.process.returncode:
            printed = (self.scratch / 'printed.txt').read_text(errors='replace')
            how = f'hung for {PATIENCE} s' if self._hung else f'died with {self.process.returncode}'
            if open_case is None:       # not even the valid files were read
                self.first = self.last
                return [{'case': -1, 'ended': 'died', 'faults': [f'{how} at the valid files'], 'did': '',
                         'message': printed[-800:]}]
            kept = self.scratch / 'faults' / str(open_case)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.scratch / 'work', kept, symlinks=True)
            found.append({'case': open_case, 'ended': 'died', 'faults': [how], 'did': '',
                          'message': printed[-800:]})
        self.first = found[-1]['case'] + 1
        return found


def _environment() -> dict:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get('PYTHONPATH', '')])
    return {**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu', 'PYTHONFAULTHANDLER': '1',
            'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', 'GRADIO_ANALYTICS_ENABLED': 'False',
            'XLA_FLAGS': '--xla_backend_optimization_level=0'}


def _weights() -> dict[str, int]:
    code = 'import json; from fuzz.kinds import all_kinds; ' \
           'print(json.dumps({kind.name: kind.weight for kind in all_kinds().values()}))'
    done = subprocess.run([sys.executable, '-c', code], env=_environment(), capture_output=True, text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(said: dict[str, list[dict]]) -> str:
    """How many cases of each kind ended how, in Markdown."""
    ends = ('right', 'other values', 'refused')
    rows = ['| kind | cases | right values | other values | refused | faults |',
            '|---|---:|---:|---:|---:|---:|']
    total = collections.Counter()
    for name, cases in said.items():
        count = collections.Counter(case['ended'] for case in cases)
        count['cases'], count['faults'] = len(cases), sum(bool(case['faults']) for case in cases)
        total += count
        rows.append(f'| {name} | {count["cases"]} | {" | ".join(str(count[end]) for end in ends)} | '
                    f'{count["faults"]} |')
    sums = ' | '.join(str(total[end]) for end in ends)
    rows.append(f'| all | {total["cases"]} | {sums} | {total["faults"]} |')
    return '\n'.join(rows)


def report(said: dict[str, list[dict]], out: Path, seed: int) -> list[str]:
    """One paragraph for each kind of fault: how often, its first case, and the command that repeats it."""
    faults = collections.defaultdict(list)
    for name, cases in said.items():
        for case in cases:
            for fault in case['faults']:
                where = case.get('message', '').strip().splitlines()[-1:] if case['ended'] == 'raised' else []
                faults[name, fault.split(' [')[0][:60], ''.join(where)[:60]].append(case)
    return [f'{name}: {fault} ({len(cases)} times); first in case {cases[0]["case"]} '
            f'({cases[0]["did"][:90]})\n'
            f'    {" ".join(cases[0].get("message", "").split())[-420:]}\n'
            f'    files: {out / name.replace(" ", "_") / "faults" / str(cases[0]["case"])}\n'
            f'    again: PYTHONPATH=.:tests python -m fuzz.campaign --kinds="{name}" --seed={seed} '
            f'--case={cases[0]["case"]}' for (name, fault, _), cases in faults.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--cases', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', default='', help='names with commas between them; default: all')
    parser.add_argument('--case', type=int, help='one case of one kind')
    parser.add_argument('--jobs', type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument('--out', type=Path, default=Path('runs/fuzz'))
    args = parser.parse_args()
    kinds = [name for name in args.kinds.split(',') if name]
    if args.case is not None:
        worker = _Worker(args.out, args.seed, kinds[0], args.case, args.case + 1)
        while not worker.ended():
            time.sleep(0.1)
        print(json.dumps(worker.cases(), indent=1).replace('\\n', '\n'))
        return 0
    began, said = time.monotonic(), run(args.cases, args.seed, args.out, kinds, args.jobs)
    found = report(said, args.out, args.seed)
    print(table(said), *found, sep='\n\n')
    print(f'\n{sum(map(len, said.values()))} cases, seed {args.seed}, {len(found)} kinds of faults, '
          f'{time.monotonic() - began:.0f} s')
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
