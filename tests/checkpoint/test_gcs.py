"""Checkpoints in gs:// with the real gcsfs and TensorStore's own driver, against tests/gcs_server.py.

Needs a package that no other test does: `pip install "lit_jax[gcs]"`."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gcs_server import gcs_server
from processes import assert_all_good, run_processes

pytest.importorskip('gcsfs', reason='gcsfs comes with the extra gcs')
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name('checkpoint_processes.py')


@pytest.fixture(scope='module')
def env():
    """The environment of a process that finds gs://bucket on this machine."""
    with gcs_server() as variables:
        yield variables


@pytest.mark.parametrize('writers', [1, 2])
def test_what_one_or_two_processes_write_into_a_bucket_is_read_back_by_one(env, writers):
    folder = f'gs://bucket/run{writers}'
    assert_all_good(run_processes([SCRIPT, 'write_everything', folder], writers, timeout=120, env=env))
    results = run_processes([SCRIPT, 'read_everything', folder], 1, devices_each=2, timeout=60, env=env)
    assert_all_good(results)
    assert all(said in results[0][1] for said in ('DAMAGED 1', 'UNFINISHED 1', 'AGAIN 2'))


def test_a_bucket_that_is_not_there(env):
    code = 'from lit_jax.runtime import paths; paths.check_reachable("gs://bukket/run")'
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, **env}, capture_output=True,
                          text=True, cwd=SCRIPT.parents[2], timeout=60)
    assert 'UserError: gs://bukket/run: there is no such bucket' in done.stderr, done.stderr
