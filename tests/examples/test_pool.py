"""Workers of the demos."""
import os
import time

import pytest

from examples import pool


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
