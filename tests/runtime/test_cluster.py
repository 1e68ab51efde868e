"""Joining, agreeing and giving up, as far as one process can show it; test_processes_train.py has the real
ones."""
import logging
import os
import subprocess
import sys
import time

import jax
import pytest

from lit_jax.runtime import cluster
from lit_jax.runtime.errors import UserError


@pytest.mark.parametrize('environment, tpu, expected', [
    ({}, False, None),
    ({}, True, 'TPU VM'),
    # salloc's shell: not a job step
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}, False, None),
    ({'SLURM_STEP_NODELIST': 'a[1-2]', 'SLURM_NTASKS': '8'}, False, 'SLURM'),
    ({'SLURM_STEP_NODELIST': 'a1', 'SLURM_NTASKS': '1'}, False, None),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, False, 'Open MPI'),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, False, None),
    ({'TPU_WORKER_HOSTNAMES': 'w0,w1'}, True, 'GKE'),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False, None),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'w0'}, True, 'GKE'),
    ({'JAX_COORDINATOR_ADDRESS': 'h:1'}, False, 'JAX_COORDINATOR_ADDRESS'),
])
def test_a_run_joins_when_and_only_when_a_cluster_is_there(environment, tpu, expected):
    assert cluster.find_cluster(environment, tpu) == expected


@pytest.mark.parametrize('flags, message', [
    (('h:1', None, 0), '--num_processes is missing'),
    ((None, 2, 0), '--coordinator is missing'),
    (('h', 2, 0), '--coordinator=h has no port'),
    (('h:x', 2, 0), '--coordinator=h:x has no port'),
    (('h:1', 2, 2), r'--process_id=2 is not in 0\.\.1'),
    (('h:1', 2, -1), r'--process_id=-1 is not in 0\.\.1'),
])
def test_incomplete_or_wrong_flags_are_explained(flags, message):
    with pytest.raises(UserError, match=message):
        cluster.join(*flags)


def test_alone_nothing_is_started(monkeypatch):
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **options: pytest.fail('joined nobody'))
    monkeypatch.setattr(cluster, 'has_tpus', lambda: False)
    for name in ('SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES',
                 'JAX_COORDINATOR_ADDRESS'):
        monkeypatch.delenv(name, raising=False)
    cluster.join()
    assert cluster.process() == (0, 1)


def test_a_scheduler_that_jax_does_not_understand_is_explained(monkeypatch):
    def fail(*args, **options):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
    with pytest.raises(UserError,
                       match=r'Open MPI started this process beside others.*--coordinator=HOST0:PORT'):
        cluster.join()


def test_a_machine_with_tpus_and_no_word_of_others_runs_alone(monkeypatch, caplog):
    def fail(*args, **options):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    monkeypatch.setattr(cluster, 'has_tpus', lambda: True)
    for name in ('SLURM_STEP_NODELIST', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES',
                 'JAX_COORDINATOR_ADDRESS'):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.INFO, 'lit_jax'):
        cluster.join()
    assert 'running alone' in caplog.text


def pretend_two(monkeypatch, texts):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(cluster, '_gather',
                        lambda text: [('process 0 (a)', text), ('process 1 (b)', texts or text)])


def test_differences_are_named_with_both_values_and_hosts(monkeypatch):
    pretend_two(monkeypatch, '{"recipe": {"train": {"steps": 3}}, "jax": "0.1"}')
    with pytest.raises(UserError) as caught:
        cluster.check_same({'recipe': {'train': {'steps': 4}}, 'jax': '0.1'})
    assert 'recipe.train.steps: 4 on process 0 (a), 3 on process 1 (b)' in str(caught.value)
    assert 'jax' not in str(caught.value).splitlines()[1]


def test_equal_facts_pass(monkeypatch):
    pretend_two(monkeypatch, None)
    cluster.check_same(cluster.code_facts.__wrapped__())


def test_the_code_fact_changes_with_the_code(monkeypatch, tmp_path):
    (tmp_path / 'training').mkdir()
    source = tmp_path / 'training' / 'a.py'
    monkeypatch.setattr(cluster, '__file__', str(source))
    facts = []
    for text in ('x = 1', 'x = 2'):
        source.write_text(text)
        facts.append(cluster.code_facts.__wrapped__()['lit_jax code'])
    assert facts[0] != facts[1]


def test_a_lost_process_ends_this_one_without_unwinding():
    """In a process of its own, as it ends: status 76, the message, and no `finally` that would wait for the
    dead."""
    script = ('import jax, logging; from lit_jax.runtime import cluster\n'
              'logging.basicConfig(); jax.process_count = lambda: 2\n'
              'try:\n'
              '    with cluster.peers_watched(lambda: "it goes on from step 40"):\n'
              '        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset '
              'by peer")\nfinally:\n'
              '    print("unwound")\n')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert done.returncode == cluster.LOST == 76
    assert 'another process of this run is gone (UNKNOWN: Gloo' in done.stderr \
        and 'it goes on from step 40' in done.stderr
    assert 'unwound' not in done.stdout


@pytest.mark.parametrize('processes, text', [(1, 'Gloo failed'), (2, 'RESOURCE_EXHAUSTED: out of memory')])
def test_other_failures_pass(monkeypatch, processes, text):
    monkeypatch.setattr(jax, 'process_count', lambda: processes)
    with pytest.raises(jax.errors.JaxRuntimeError), cluster.peers_watched(str):
        raise jax.errors.JaxRuntimeError(text)


def test_the_watchdog_speaks_once_when_steps_stop_and_gives_up_in_the_end(monkeypatch, caplog):
    left = []
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(cluster.signals, 'leave', lambda status: left.append(1))
    with caplog.at_level(logging.ERROR, 'lit_jax'):
        dog = cluster.Watchdog(0.2, lambda: 'it goes on from step 7', hang_seconds=0.8)
        time.sleep(0.5)
        assert not caplog.records        # before the first step there is nothing to expect
        dog.beat()
        deadline = time.monotonic() + 10
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
        dog.close()
    messages = [record.getMessage() for record in caplog.records]
    assert left and sum('no step has finished for' in message for message in messages) == 1
    assert 'it goes on from step 7' in messages[0] and any('giving up' in message for message in messages)


def test_the_watchdog_sleeps_while_the_run_rests(monkeypatch, caplog):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with caplog.at_level(logging.ERROR, 'lit_jax'):
        dog = cluster.Watchdog(0.1, str, hang_seconds=60)
        dog.beat()
        dog.rest()
        time.sleep(0.5)
        dog.close()
    assert not caplog.records
