"""Workers of the demos."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import pool


def test_the_status_says_which_runs_are_how_far_and_where_their_logs_are(tmp_path):
    steps = SimpleNamespace(align=SimpleNamespace(steps=200), train=SimpleNamespace(steps=800))
    jobs = [SimpleNamespace(arm=arm, seed=0, path=tmp_path / arm, recipe=lambda: steps)
            for arm in ('distilled', 'inherited', 'begun', 'scratch', 'over')]
    for arm, record in (('distilled', '{"step": 250, "time/eta_s": 75}'), ('inherited', '{"step": 1000}'),
                        ('begun', ''), ('over', '{"step": 1000}')):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / 'metrics.jsonl').write_text(record + '\n' * bool(record))
        (tmp_path / arm / 'log.txt').touch()
    left = {(job.arm, 0): True for job in jobs[:-1]} | {('teacher', 0): True, ('other', 0): False}
    assert pool._status(jobs, left, time.monotonic() - 61) == (
        '1m 01s: distilled seed 0 step 250/1,000, 1m 15s left; inherited seed 0 is sampled and scored; '
        f'begun seed 0 step 0/1,000; teacher is sampled and scored; 2 waiting; logs: {tmp_path}/*/log.txt')


def _where(_) -> tuple[int, frozenset, str]:
    time.sleep(0.5)     # so that both workers take one
    return os.getpid(), frozenset(os.sched_getaffinity(0)), os.environ['GLIBC_TUNABLES']


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='processes are bound to cores on Linux')
def test_each_worker_keeps_to_a_core_of_its_own(monkeypatch):
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
    mine = os.sched_getaffinity(0)
    with pool.workers(2) as both:
        found = list(both.map(_where, range(6)))
    cores = {pid: core for pid, core, _ in found}
    assert len(cores) == 2 and all(len(core) == 1 and core <= mine for core in cores.values())
    assert len(set(cores.values())) == min(2, len(mine))
    assert {pages for *_, pages in found} == {'glibc.malloc.hugetlb=1'}
    assert os.sched_getaffinity(0) == mine


def _sleep(_) -> None:
    print(os.getpid(), flush=True)
    time.sleep(300)


def _two_asleep() -> None:
    with pool.workers(2) as both:
        list(both.map(_sleep, range(2)))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_stopped_takes_its_workers_with_it(number):
    here = Path(__file__).parent
    demo = subprocess.Popen([sys.executable, '-c', 'from test_pool import _two_asleep as go; go()'],
                            env={**os.environ, 'PYTHONPATH': f'{here}:{here.parents[1]}'}, text=True,
                            stdout=subprocess.PIPE)
    try:
        workers = [int(demo.stdout.readline()) for _ in range(2)]
        demo.send_signal(number)
        demo.wait(timeout=20)
        end = time.monotonic() + 30
        while any(map(_is_running, workers)):
            assert time.monotonic() < end, 'workers run on'
            time.sleep(0.2)
    finally:
        demo.kill()


def _is_running(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False
