"""train.py in several real processes on loopback: the same run as one process, and what happens when one is
lost."""
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import ROOT, assert_all_good, on_cpu, run_processes, start_processes

import lit_jax
from lit_jax.data.sources import open_source
from lit_jax.report.grids import to_uint8
from lit_jax.training.telemetry import read_lines

pytestmark = pytest.mark.slow
HEARTBEAT = 10
# seconds from the death of a process to the end of the others: HEARTBEAT, its round, and a busy machine
BOUND = 40
JOIN = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}',
        f'--heartbeat_seconds={HEARTBEAT}']
SMALL = ['--config.data.name=synthetic', '--config.model.depth=2', '--config.model.width=32',
         '--config.train.batch_size=16', '--config.sample.every=0', '--config.log.every=1',
         '--config.checkpoint.every=4', '--config.mesh.fsdp=2']


def command(recipe, workdir, *extra):
    return ['train.py', f'--config=configs/{recipe}.py', f'--workdir={workdir}', *SMALL, *extra]


def train_alone(recipe, workdir, *extra, devices=4):
    done = subprocess.run([sys.executable, *command(recipe, workdir, *extra)], cwd=ROOT, env=on_cpu(devices),
                          text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr


def losses(workdir, after=0):
    lines = [line for line in read_lines(workdir / 'metrics.jsonl') if line['step'] > after]
    return [line['step'] for line in lines], np.array([line['loss/total'] for line in lines])


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """(folder, options of the student, workdir of twelve steps in one process of four devices)."""
    folder = tmp_path_factory.mktemp('processes')
    train_alone('digits_dit', folder / 'teacher', '--config.train.steps=4')
    student = [f'--config.teacher.path={folder / "teacher"}', f'--config.inherit.path={folder / "teacher"}']
    train_alone('digits_lit', folder / 'straight', '--config.train.steps=12', *student)
    return folder, student, folder / 'straight'


def test_four_processes_then_two_or_one_are_the_same_run(straight):
    folder, student, reference = straight
    four = command('digits_lit', folder / 'four', '--config.train.steps=8', '--config.sample.every=8',
                   '--config.sample.steps=2', *student, *JOIN)
    assert_all_good(run_processes(four, 4, timeout=200))
    assert (folder / 'four' / 'samples' / '000000008.png').stat().st_size > 100
    shutil.copytree(folder / 'four', folder / 'one')
    # Rows of tokens cut over both processes: each reads the whole batch, and the layout is another one than
    # before.
    two = command('digits_lit', folder / 'four', '--config.train.steps=12', *student, *JOIN,
                  '--config.mesh.data=1', '--config.mesh.fsdp=1', '--config.mesh.seq=4')
    results = run_processes(two, 2, devices_each=2, timeout=200)
    assert_all_good(results)
    # process 0 speaks, the other does not
    assert 'resumed from step 8' in results[0][1] and 'resumed' not in results[1][1]
    train_alone('digits_lit', folder / 'one', '--config.train.steps=12', *student)
    steps, want = losses(reference)
    for name in ('four', 'one'):
        got_steps, got = losses(folder / name)
        assert got_steps == steps == list(range(1, 13))
        np.testing.assert_allclose(got, want, rtol=1e-5)      # the order of sums over processes


@pytest.mark.parametrize('victim', [0, 1], ids=['the coordinator', 'another'])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(straight, victim):
    folder, student, reference = straight
    workdir = folder / f'killed{victim}'
    endless = command('digits_lit', workdir, '--config.train.steps=1000000', *student, *JOIN)
    with start_processes(endless, 2, devices_each=2) as run:
        run.wait_for_output(0, 'step 9/', timeout=150)
        run.kill(victim)
        began = time.monotonic()
        while run.returncode(1 - victim) is None and time.monotonic() < began + BOUND:
            time.sleep(0.2)
        status, output = run.returncode(1 - victim), run.output(1 - victim)
    print(f'ended with {status} after {time.monotonic() - began:.1f} s')
    assert status in (76, -signal.SIGABRT), output
    assert 'another process of this run is' in output or 'another task died' in output, output
    again = command('digits_lit', workdir, '--config.train.steps=12', *student, *JOIN)
    kept = max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
    assert kept >= 4      # that of step 8 may still have been on its way
    if kept >= 12:      # a fast machine went on for longer than the reference
        pytest.skip(f'the run was at step {kept} when it was killed')
    assert_all_good(run_processes(again, 2, devices_each=2, timeout=200))
    np.testing.assert_allclose(losses(workdir)[1], losses(reference)[1], rtol=1e-5)


def test_sigterm_to_one_stops_all_with_everything_saved(straight):
    folder, student, _ = straight
    endless = command('digits_lit', folder / 'stopped', '--config.train.steps=1000000',
                      '--config.checkpoint.every=500000', *student, *JOIN)
    with start_processes(endless, 2, devices_each=2) as run:
        run.wait_for_output(0, 'step 3/', timeout=150)
        run.signal(1, signal.SIGTERM)
        results = run.wait(timeout=90)
    assert [status for status, _ in results] == [75, 75], results
    assert 'asked to stop: saved step' in results[0][1]
    saved = [int(path.name) for path in (folder / 'stopped' / 'checkpoints').iterdir()]
    assert saved == [losses(folder / 'stopped')[0][-1]]


def test_processes_that_are_not_alike_do_not_start(straight, tmp_path):
    _, student, _ = straight
    different = command('digits_lit', tmp_path / 'run', '--config.train.steps=12', *student, *JOIN,
                        '--config.train.learning_rate=1e-{process_id}')
    for status, output in run_processes(different, 2, timeout=120):
        assert status == 1, output
        assert 'recipe.train.learning_rate: 1.0 on process 0 (' in output and '0.1 on process 1 (' in output
    assert not (tmp_path / 'run').exists()


def test_a_teacher_that_one_host_cannot_see_stops_all(straight, tmp_path):
    folder, _, _ = straight
    script = tmp_path / 'host.py'
    # The hosts of this test share a file system: each looks in a folder of its own.
    script.write_text('import os, runpy, sys\n'
                      'sys.path.insert(0, os.getcwd())\n'
                      'here = os.path.abspath("train.py")\n'
                      f'os.makedirs({str(tmp_path)!r} + "/host" + sys.argv[1], exist_ok=True)\n'
                      f'os.chdir({str(tmp_path)!r} + "/host" + sys.argv.pop(1))\n'
                      'runpy.run_path(here, run_name="__main__")\n')
    (tmp_path / 'host0').mkdir()
    os.symlink(folder / 'teacher', tmp_path / 'host0' / 'teacher')
    one_blind = [str(script), '{process_id}', f'--config={ROOT}/configs/digits_lit.py',
                 f'--workdir={tmp_path / "run"}', *SMALL, '--config.train.steps=4',
                 '--config.teacher.path=teacher', '--config.inherit.path=teacher', *JOIN]
    for status, output in run_processes(one_blind, 2, timeout=120):
        assert status == 1 and 'inherit.path: teacher does not exist' in output, output
    assert not (tmp_path / 'run').exists()


def test_two_processes_score_as_one(tmp_path):
    digits = open_source('digits', split='train')
    images = to_uint8(digits.take(range(200))['image'])
    np.savez(tmp_path / 'reference.npz', arr_0=np.broadcast_to(images, (*images.shape[:3], 3)))
    scored = ['--config.data.name=digits', '--config.train.steps=4', '--config.eval.every=4',
              '--config.eval.num_samples=72',
              '--config.eval.steps=3', '--config.eval.features=digits', '--config.eval.metrics=fid,recall',
              f'--config.eval.reference={tmp_path / "reference.npz"}']
    train_alone('digits_dit', tmp_path / 'one', *scored)
    assert_all_good(run_processes([*command('digits_dit', tmp_path / 'two', *scored), *JOIN], 2,
                                  devices_each=2, timeout=200))
    one, two = (read_lines(tmp_path / name / 'metrics.jsonl')[-1] for name in ('one', 'two'))
    assert one['eval/num_samples'] == two['eval/num_samples'] == 72
    for name in ('eval/fid_cfg1', 'eval/recall_cfg1'):      # the weights differ in their last bits
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3)
    assert lit_jax.load(tmp_path / 'two' / 'best').config['provenance']['step'] == 4
