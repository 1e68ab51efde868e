"""A run killed at random moments, also during saves, ends bit for bit like the run that was never killed.

    make test-slow PYTEST_ARGS="-n 0 -s --kills=100 tests/training/test_exact_resume.py"
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_jax import recipes
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.training import setup
from lit_jax.training.mesh import make_mesh
from lit_jax.training.telemetry import read_lines

ROOT = Path(__file__).parents[2]
STEPS_A_KILL = 75
SMALL = ['--config.model.depth=2', '--config.model.width=32', '--config.train.batch_size=32',
         '--config.sample.every=0']


def environment(tmp_path):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
           'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'LIT_JAX_DATA': str(tmp_path / 'data')}
    return env


def start(tmp_path, recipe, workdir, *extra):
    command = [sys.executable, 'train.py', f'--config=configs/{recipe}.py', f'--workdir={tmp_path / workdir}',
               *SMALL, *extra]
    return subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def finish(process):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors


def kill_later(process, delay):
    """SIGKILL `delay` seconds after the first step is possible; False if the run was done before."""
    for line in process.stderr:
        if ' images a step on ' in line:
            break
    time.sleep(delay)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def outcome(workdir, recipe):
    """Every array of the final checkpoint, and the metrics without timings."""
    config = recipes.load_recipe(recipe)
    config.model.update({'depth': 2, 'width': 32})
    config = recipes.finalize(config, 8)
    mesh = make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1, 'seq': 1})
    abstract = setup.abstract_sharded_state(setup.build_network(config), setup.build_optimizer(config), mesh)
    with Checkpoints(workdir) as checkpoints:
        state, meta, step = checkpoints.restore_latest(abstract)
    metrics = [{k: v for k, v in line.items() if not k.startswith(('time/', 'data/', 'perf/'))}
               for line in read_lines(workdir / 'metrics.jsonl')]
    return jax.device_get(state), meta, step, metrics


@pytest.mark.slow
def test_a_run_killed_many_times_equals_one_never_killed(tmp_path, pytestconfig):
    """Through both stages: a third of the steps align, the rest distil."""
    wanted = pytestconfig.getoption('kills')
    steps = STEPS_A_KILL * wanted
    finish(start(tmp_path, 'digits_dit', 'teacher', '--config.train.steps=5'))
    student = [f'--config.teacher.path={tmp_path / "teacher"}',
               f'--config.inherit.path={tmp_path / "teacher"}', f'--config.align.steps={steps // 3}',
               f'--config.train.steps={steps - steps // 3}', '--config.log.every=40',
               '--config.checkpoint.every=15', '--config.checkpoint.keep_latest=2']
    began = time.perf_counter()
    finish(start(tmp_path, 'digits_lit', 'straight', *student))
    seconds = time.perf_counter() - began
    rng, kills, during_save = random.Random(wanted), 0, 0
    while kills < wanted:
        process = start(tmp_path, 'digits_lit', 'killed', *student)
        if not kill_later(process, rng.uniform(0, 1.2 * seconds / wanted)):
            break
        kills += 1
        during_save += any('orbax-checkpoint-tmp' in path.name
                           for path in (tmp_path / 'killed' / 'checkpoints').glob('*'))
    finish(start(tmp_path, 'digits_lit', 'killed', *student))
    print(f'{kills} kills, {during_save} of them during a save')
    assert kills == wanted
    assert during_save >= 1
    state, meta, step, metrics = outcome(tmp_path / 'straight', 'digits_lit')
    state2, meta2, step2, metrics2 = outcome(tmp_path / 'killed', 'digits_lit')
    assert step == step2 == steps and meta == meta2 and metrics == metrics2
    jax.tree.map(np.testing.assert_array_equal, state, state2)
