"""The launchers: sound shell, what they would run, and that their train command is one that trains.

No launcher may reach a real cloud from here: gcloud, xpk, docker, srun and scontrol are scripts of the tests.
"""
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / 'launch').glob('*.sh'), ROOT / 'launch' / 'slurm.sbatch'])
CLOUD = {'PROJECT': 'my-project', 'ZONE': 'us-west4-a', 'WORKDIR': 'gs://my-bucket/runs/lit_xl',
         'IMAGE': 'repo/lit_jax:1'}
FLAGS = ['--config.train.batch_size=512', "--config.name=a b'c"]
SINGLE_TASK = {'SLURM_JOB_ID': '4711', 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0',
               'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1', 'SLURM_STEP_ID': '0',
               'SLURM_NODEID': '0'}


@pytest.fixture
def machine(tmp_path):
    """A checkout with the launchers alone and stand-ins for every outside tool; each says what it was called
    with."""
    shutil.copytree(ROOT / 'launch', tmp_path / 'lit_jax' / 'launch')
    (tmp_path / 'bin').mkdir()
    for name in ('gcloud', 'xpk', 'docker', 'git', 'srun', 'scontrol'):
        stand_in(tmp_path, name, '')
    return tmp_path


def stand_in(machine, name, body):
    """Puts a tool on the PATH of `machine` that notes its arguments, one line each call, and then runs
    `body`."""
    path = machine / 'bin' / name
    path.write_text(f'#!/usr/bin/env bash\necho {name} "${{@@Q}}" >> {machine}/calls\n{body}\n')
    path.chmod(0o755)
    return path


def calls(machine, name=''):
    path = machine / 'calls'
    return [shlex.split(line) for line in path.read_text().splitlines()
            if line.startswith(name)] if path.exists() else []


def launch(machine, script, *arguments, **env):
    """(exit status, stdout, stderr) of a launcher in `machine`, with nothing of this shell but PATH and
    HOME."""
    clean = {'PATH': f'{machine / "bin"}:{os.environ["PATH"]}', 'HOME': str(machine), **env}
    done = subprocess.run(['bash', f'launch/{script}', *arguments], cwd=machine / 'lit_jax', env=clean,
                          timeout=120, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_it(script):
    done = subprocess.run(['bash', '-n', str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def test_shellcheck_is_clean():
    found = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    if found is None:
        pytest.skip('shellcheck comes with the extra test')
    done = subprocess.run([found, '--external-sources', *map(str, SCRIPTS)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout


def printed(machine, script, *arguments, **env):
    """The commands of a dry run as lists of words; nothing may have been called."""
    status, out, errors = launch(machine, script, *arguments, DRY_RUN='1', **env)
    assert status == 0, errors
    assert calls(machine) == []
    return [shlex.split(line) for line in out.splitlines()] if script != 'slurm.sbatch' else [
        shlex.split(out)]


def test_a_queued_resource_is_asked_for_set_up_and_trained_on(machine):
    script, where = 'tpu_queued_resource.sh', ['--project=my-project', '--zone=us-west4-a']
    (create,) = printed(machine, script, 'create', **CLOUD)
    assert create == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'lit-xl', *where,
                      '--node-id=lit-xl', '--accelerator-type=v5litepod-16',
                      '--runtime-version=v2-alpha-tpuv5-lite', '--spot']
    assert '--spot' not in printed(machine, script, 'create', **CLOUD, SPOT='0')[0]
    archive, copy, install = printed(machine, script, 'setup', **CLOUD)
    assert archive[:2] == ['git', 'archive'] and copy[-1] == install[-2] == '--worker=all'
    assert '-e ".[gcs,tpu]"' in install[-1]
    (train,) = printed(machine, script, 'train', *FLAGS, **CLOUD)
    assert train[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh'] and '--worker=all' in train
    loop = 'CONFIG=configs/lit_xl.py WORKDIR=gs://my-bucket/runs/lit_xl bash launch/restart_loop.sh'
    assert loop in train[-1]
    (delete,) = printed(machine, script, 'delete', **CLOUD)
    assert delete[3:6] == ['queued-resources', 'delete', 'lit-xl'] and '--force' in delete


def test_a_workload_is_submitted_with_the_train_command(machine):
    (train,) = printed(machine, 'gke_xpk.sh', 'train', *FLAGS, **CLOUD)
    assert train[:3] == ['xpk', 'workload', 'create'] and '--restart-on-exit-codes=75,76' in train
    words = shlex.split(train[-1].removeprefix('--command='))
    assert words == ['exec', 'env', 'CONFIG=configs/lit_xl.py', 'WORKDIR=gs://my-bucket/runs/lit_xl', 'bash',
                     'launch/train_command.sh', *FLAGS]
    (cluster,) = printed(machine, 'gke_xpk.sh', 'cluster', **CLOUD)
    assert cluster[:3] == ['xpk', 'cluster', 'create'] and cluster[-1] == '--spot'
    build, push = printed(machine, 'gke_xpk.sh', 'image', **CLOUD)
    assert '--file=docker/tpu.Dockerfile' in build and (ROOT / 'docker' / 'tpu.Dockerfile').exists()
    assert push == ['docker', 'push', 'repo/lit_jax:1']


def test_slurm_runs_the_train_command_in_every_task(machine):
    (srun,) = printed(machine, 'slurm.sbatch', *FLAGS, CONFIG='configs/lit_xl.py', WORKDIR='/runs/a')
    assert srun[:5] == ['srun', '--kill-on-bad-exit=1', '--export=ALL', 'bash', '-c']
    assert 'bash launch/train_command.sh' in srun[5] and srun[-2:] == FLAGS


@pytest.mark.parametrize('script, arguments, given, missing', [
    ('tpu_queued_resource.sh', ['create'], {}, 'PROJECT'),
    ('gke_xpk.sh', ['cluster'], {'PROJECT': 'p'}, 'ZONE'),
    ('tpu_queued_resource.sh', ['train'], {'PROJECT': 'p', 'ZONE': 'z'}, 'WORKDIR'),
    ('gke_xpk.sh', ['train'], {'PROJECT': 'p', 'ZONE': 'z', 'WORKDIR': 'w'}, 'IMAGE'),
    ('slurm.sbatch', [], {'CONFIG': 'c'}, 'WORKDIR'), ('train_command.sh', [], {'WORKDIR': 'w'}, 'CONFIG')])
def test_a_missing_variable_is_named_before_anything_runs(machine, script, arguments, given, missing):
    status, _, errors = launch(machine, script, *arguments, **given)
    assert status != 0 and f'{missing}: ' in errors
    assert calls(machine) == []


@pytest.mark.parametrize('script', ['tpu_queued_resource.sh', 'gke_xpk.sh'])
def test_an_unknown_command_shows_the_usage(machine, script):
    status, _, errors = launch(machine, script, 'fly', **CLOUD)
    assert status == 2 and f'launch/{script} train [FLAGS]' in errors
    assert calls(machine) == []


def fake_python(machine, body):
    """A python that notes its call and does `body`."""
    return str(stand_in(machine, 'fake_python', body))


def test_the_remote_command_survives_its_quoting_and_lets_ssh_go(machine):
    python = fake_python(machine, 'sleep 3; exit 0')
    stand_in(machine, 'gcloud', f'cd {machine}; export PYTHON={python}\n'
                                'line="${@: -1}"; bash -c "${line#--command=}"')
    began = time.monotonic()
    status, _, errors = launch(machine, 'tpu_queued_resource.sh', 'train', *FLAGS, **CLOUD)
    assert (status, errors) == (0, '') and time.monotonic() - began < 2.5      # not until the run ends
    wait_for(lambda: 'train.py ended with 0' in (machine / 'lit_jax' / 'train.log').read_text())
    assert calls(machine, 'fake_python') == [['fake_python', 'train.py', '--config=configs/lit_xl.py',
                                              '--workdir=gs://my-bucket/runs/lit_xl', *FLAGS]]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize('states, status', [('PROVISIONING ACTIVE', 0), ('WAITING_FOR_RESOURCES FAILED', 1)])
def test_waiting_for_a_slice_ends_when_it_is_there_or_lost(machine, states, status):
    (machine / 'states').write_text('\n'.join(states.split()) + '\n')
    stand_in(machine, 'gcloud', f'head -n 1 {machine}/states; sed -i 1d {machine}/states')
    done, out, _ = launch(machine, 'tpu_queued_resource.sh', 'wait', **CLOUD, POLL_SECONDS='0')
    assert done == status and states.split()[0] in out


LOOP = {'CONFIG': 'c', 'WORKDIR': 'w', 'RESTART_PAUSE': '0'}


@pytest.mark.parametrize('statuses, ends_with, runs', [
    ('75 76 134 0', 0, 4), ('75 1 0', 1, 2), ('2 0', 2, 1), ('75 75 75 75 75', 75, 3)])
def test_the_loop_starts_again_after_what_passes_and_stops_at_an_error(machine, statuses, ends_with, runs):
    (machine / 'statuses').write_text('\n'.join(statuses.split()) + '\n')
    python = fake_python(machine, f'status=$(head -n 1 {machine}/statuses); sed -i 1d {machine}/statuses; '
                                  f'exit "$status"')
    status, _, errors = launch(machine, 'restart_loop.sh', **LOOP, PYTHON=python,
                               MAX_RESTARTS='2' if runs == 3 else '9')
    assert status == ends_with and f'ended with {ends_with}; not started again' in errors
    assert len(calls(machine, 'fake_python')) == runs


def test_the_loop_hands_on_term_waits_for_the_save_and_does_not_start_again(machine):
    python = fake_python(machine, f'trap "sleep 0.5; touch {machine}/saved; exit 75" TERM; touch '
                                  f'{machine}/up\nwhile :; do sleep 0.1; done')
    env = {'PATH': f'{machine / "bin"}:{os.environ["PATH"]}', **LOOP, 'PYTHON': python}
    process = subprocess.Popen(['bash', 'launch/restart_loop.sh'], cwd=machine / 'lit_jax', env=env,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for((machine / 'up').exists)
        status, _, errors = launch(machine, 'restart_loop.sh', **LOOP, PYTHON=python)
        assert status == 2 and 'already' in errors
        os.kill(int((machine / 'lit_jax' / 'train.pid').read_text()), signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75 and (machine / 'saved').exists() and 'not started again' in errors
    assert len(calls(machine, 'fake_python')) == 1


def slurm(machine, status, tasks=1, **env):
    """slurm.sbatch with an srun that runs `tasks` tasks one after another; the last of `status` is srun's
    own."""
    statuses = str(status).split()
    python = fake_python(machine, 'exit "$TASK_STATUS"')
    body = 'shift 2\n' + '\n'.join(f'TASK_STATUS={code} "$@"'
                                   for code in statuses[:tasks]) + f'\nexit {statuses[-1]}'
    stand_in(machine, 'srun', body)
    return launch(machine, 'slurm.sbatch', *FLAGS, CONFIG='configs/a.py', WORKDIR='/runs/a', PYTHON=python,
                  SLURM_JOB_ID='4711', SLURM_SUBMIT_DIR=str(machine / 'lit_jax'), **env)


@pytest.mark.parametrize('status', [75, 76, 134, 137])
def test_slurm_requeues_what_was_preempted_or_lost(machine, status):
    assert slurm(machine, status)[0] == 0
    assert calls(machine, 'scontrol') == [['scontrol', 'requeue', '4711']]
    assert calls(machine, 'fake_python') == [['fake_python', 'train.py', '--config=configs/a.py',
                                              '--workdir=/runs/a', *FLAGS]]


@pytest.mark.parametrize('status, tasks, ends_with, message', [
    ('0', 1, 0, ''), ('1', 1, 1, 'not started again'), ('143 1 143', 2, 1, 'a task ended with an error')])
def test_slurm_leaves_a_done_or_a_wrong_run_alone(machine, status, tasks, ends_with, message):
    """Also when the tasks that srun killed because of the wrong one report a higher status."""
    done, _, errors = slurm(machine, status, tasks)
    assert done == ends_with and message in errors
    assert calls(machine, 'scontrol') == []
    assert not list((machine / 'lit_jax').glob('*.stop'))


def test_slurm_gives_up_after_so_many_restarts(machine):
    status, _, errors = slurm(machine, 75, MAX_RESTARTS='3', SLURM_RESTART_COUNT='3')
    assert status == 75 and 'after 3 restarts' in errors
    assert calls(machine, 'scontrol') == []


SAVES_ON_TERM = 'trap "sleep 0.3; exit 75" TERM; touch {machine}/up; while :; do sleep 0.1; done'


def started(machine, script, srun):
    """The process of a launcher whose task is up and saves on TERM."""
    python = fake_python(machine, SAVES_ON_TERM.format(machine=machine))
    stand_in(machine, 'srun', srun)
    env = {'PATH': f'{machine / "bin"}:{os.environ["PATH"]}', 'CONFIG': 'c', 'WORKDIR': 'w', 'PYTHON': python,
           'SLURM_JOB_ID': '4711', 'SLURM_SUBMIT_DIR': str(machine / 'lit_jax')}
    process = subprocess.Popen(['bash', f'launch/{script}'], cwd=machine / 'lit_jax', env=env,
                               start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for((machine / 'up').exists)
    return process


def test_the_time_limit_signals_the_whole_task_and_its_status_is_that_of_the_run(machine):
    """SLURM sends TERM to every process of the step, the shell around train.py included."""
    process = started(machine, 'slurm.sbatch', f'shift 2; setsid "$@" & echo $! > {machine}/task; wait $!; '
                                               f'exit $?')
    os.killpg(int((machine / 'task').read_text()), signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert 'ended with 75' in errors and calls(machine, 'scontrol') == [['scontrol', 'requeue', '4711']]


def test_a_cancelled_job_is_not_requeued(machine):
    process = started(machine, 'slurm.sbatch', 'shift 2; exec "$@"')
    os.killpg(process.pid, signal.SIGTERM)         # scancel: the batch shell and all tasks
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM and calls(machine, 'scontrol') == []


SMALL = ['--config.data.name=synthetic', '--config.model.depth=1', '--config.model.width=32',
         '--config.train.steps=2', '--config.train.batch_size=8', '--config.log.every=1',
         '--config.sample.every=0']


def training(tmp_path, **env):
    return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHON': sys.executable,
            'CONFIG': 'configs/digits_dit.py', 'WORKDIR': str(tmp_path / 'run'), **env}


def assert_trained(tmp_path, done):
    assert done.returncode == 0, done.stderr
    assert 'step 2/2' in done.stderr and 'done: 2 steps' in done.stderr
    assert (tmp_path / 'run' / 'checkpoints' / '000000002').is_dir()


@pytest.mark.slow
def test_the_train_command_trains_from_any_folder(tmp_path):
    done = subprocess.run(['bash', str(ROOT / 'launch' / 'train_command.sh'), *SMALL], cwd=tmp_path,
                          env=training(tmp_path), capture_output=True, text=True, timeout=200)
    assert_trained(tmp_path, done)


@pytest.mark.slow
def test_the_slurm_script_trains_as_a_single_task(machine):
    """The whole chain: sbatch script, srun with the variables of a one-task step, train command, train.py."""
    stand_in(machine, 'srun', 'shift 2; ' + ' '.join(f'{k}={v}' for k, v in SINGLE_TASK.items()) + ' "$@"')
    env = training(machine, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID='4711',
                   PATH=f'{machine / "bin"}:{os.environ["PATH"]}')
    done = subprocess.run(['bash', str(ROOT / 'launch' / 'slurm.sbatch'), *SMALL], cwd=machine, env=env,
                          capture_output=True, text=True, timeout=200)
    assert_trained(machine, done)
    assert calls(machine, 'scontrol') == [] and not list(ROOT.glob('slurm-*.stop'))


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_the_images_copy_what_is_there_run_as_nobody_special_and_train(name):
    lines = (ROOT / 'docker' / f'{name}.Dockerfile').read_text().splitlines()
    sources = [word for line in lines if line.startswith('COPY') for word in line.split()[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    assert any(line.startswith('USER') for line in lines) and 'useradd' in '\n'.join(lines)
    assert lines[-1] == 'ENTRYPOINT ["bash", "launch/train_command.sh"]'
