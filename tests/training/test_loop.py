"""The loop end to end on tiny recipes: resuming, stopping, refusing, diverging."""
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from tiny import tiny_recipe

import lit_jax
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop, setup
from lit_jax.training.mesh import make_mesh
from lit_jax.training.telemetry import Diverged, read_lines

TIMING = ('time/', 'data/', 'perf/')


def final_state(config, workdir):
    """Every leaf of the newest checkpoint, and the metrics without timings."""
    config = loop.finalize(config, jax.device_count())
    mesh = make_mesh(config.mesh.to_dict())
    abstract = setup.abstract_sharded_state(setup.build_network(config), setup.build_optimizer(config), mesh)
    with Checkpoints(workdir) as checkpoints:
        state, _, step = checkpoints.restore_latest(abstract)
    metrics = [{k: v for k, v in line.items() if not k.startswith(TIMING)}
               for line in read_lines(workdir / 'metrics.jsonl')]
    return jax.device_get(state), metrics, step


def assert_same_run(config, one, other):
    (state, metrics, step), (state2, metrics2, step2) = final_state(config, one), final_state(config, other)
    assert step == step2 and metrics == metrics2
    jax.tree.map(np.testing.assert_array_equal, state, state2)


def test_a_run_learns_writes_its_log_and_can_be_loaded(tmp_path, caplog):
    caplog.set_level('INFO', logger='lit_jax')
    config = tiny_recipe(steps=30, ema_warmup=True)
    config.log.every, config.checkpoint.every, config.sample.every = 10, 30, 30
    config.sample.steps, config.sample.count = 4, 8
    assert loop.train(config, tmp_path) == 'done'
    lines = read_lines(tmp_path / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [10, 20, 30]
    assert lines[-1]['loss/mse'] < lines[0]['loss/mse']
    assert lines[-1]['images_seen'] == 30 * 16
    assert (tmp_path / 'samples' / '000000030.png').stat().st_size > 100
    page, draw = (tmp_path / 'report.html').read_text(), f'python sample.py --from={tmp_path} --out=grid.png'
    assert 'base64' in page and draw in page and draw in caplog.text
    assert 'at step 30, row by row: synthetic 0, synthetic 1, synthetic 2, synthetic 3, synthetic 5' in page
    model = lit_jax.load(tmp_path)
    assert model(np.zeros((2, 8, 8, 1)), 10, 3).shape == (2, 8, 8, 2)
    assert model.config['provenance'] == {'source': str(tmp_path), 'weights': 'ema', 'step': 30}


def stop_at(call, monkeypatch):
    """Sends SIGTERM to this process while the `call`-th batch is on its way; the step in hand is still
    taken."""
    original, calls = loop.BatchLayout.place, []

    def place(self, batch):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(loop.BatchLayout, 'place', place)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp('straight')
    loop.train(tiny_recipe(steps=6), workdir)
    return workdir


@pytest.mark.parametrize('stop_after', [3, pytest.param(5, marks=pytest.mark.slow)])
def test_resuming_is_exact(tmp_path, straight, stop_after, monkeypatch):
    """A run asked to stop after any step, in the middle of a log interval or not, ends like one never
    stopped."""
    config = tiny_recipe(steps=6)
    stop_at(stop_after, monkeypatch)
    assert loop.run(config, tmp_path / 'stopped') == loop.PREEMPTED == 75
    with Checkpoints(tmp_path / 'stopped') as checkpoints:
        assert checkpoints.steps()[-1] == stop_after
    assert loop.train(config, tmp_path / 'stopped') == 'done'
    assert_same_run(config, straight, tmp_path / 'stopped')


def test_fewer_steps_than_were_taken_are_not_called_done(straight):
    log = (straight / 'metrics.jsonl').read_bytes()
    with pytest.raises(UserError, match='has reached step 6.*ends with step 4.*steps=6 or more'):
        loop.train(tiny_recipe(steps=4), straight)
    assert (straight / 'metrics.jsonl').read_bytes() == log
    assert loop.train(tiny_recipe(steps=6), straight) == 'done'


@pytest.fixture
def distillation(straight):
    """A student recipe whose teacher and inheritance are a workdir trained here."""
    config = tiny_recipe('linear', steps=4)
    config.teacher.path = config.inherit.path = str(straight)
    return config


def test_inherit_and_distil_from_a_workdir(distillation, tmp_path):
    config = distillation
    assert loop.train(config, tmp_path / 'student') == 'done'
    line = read_lines(tmp_path / 'student' / 'metrics.jsonl')[-1]
    assert line['loss/distill_noise'] > 0 and 'loss/distill_variance_q3' in line
    rows = json.loads((tmp_path / 'student' / 'inheritance.json').read_text())['rows']
    assert {row['path'] for row in rows if row['status'] == 'fresh'} == {
        f'blocks/attn/{name}' for name in ('q/kernel', 'kv/kernel', 'proj/kernel', 'proj/bias', 'dwc/kernel',
                                           'dwc/bias')}


@pytest.mark.parametrize('field, value, message', [
    (('data', 'num_classes'), 12, r'num_classes: 10 in the teacher, 12 in the recipe'),
    (('latent', 'scale'), 3.0, r'latent\.scale: 2\.0 in the teacher, 3\.0 in the recipe'),
    (('data', 'image_size'), 16, r'input_size: \[8, 8\] in the teacher, \[16, 16\] in the recipe'),
    (('diffusion', 'steps'), 500, 'diffusion'),
])
def test_a_teacher_of_another_task_is_refused(distillation, tmp_path, field, value, message):
    config = distillation
    config[field[0]][field[1]] = value
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / 'student')
    assert not (tmp_path / 'student').exists()


@pytest.mark.parametrize('change, message', [
    ({'model.width': 48}, 'width'), ({'inherit.copy': 'q,w'}, 'unknown parts to copy: w')])
def test_an_impossible_inheritance_is_refused_and_claims_no_workdir(distillation, tmp_path, change, message):
    config = distillation
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / 'student')
    assert not (tmp_path / 'student').exists()


@pytest.fixture
def begun(one_step, tmp_path):
    """A workdir after its first step, to go on in."""
    return shutil.copytree(one_step, tmp_path / 'begun')


def test_another_recipe_in_the_same_workdir_is_refused(begun):
    with pytest.raises(UserError,
                       match=r'belongs to another recipe:\n  train.learning_rate: 0.001 there, 0.002'):
        loop.train(tiny_recipe(steps=1, learning_rate=2e-3), begun)
    assert loop.train(tiny_recipe(steps=2), begun) == 'done'     # going on for longer is the same recipe


def test_a_workdir_of_an_older_version_goes_on(begun):
    kept = json.loads((begun / 'config.json').read_text())
    del kept['checksum']
    del kept['recipe']['data']['classes'], kept['recipe']['eval']     # as if recipes had gained them since
    (begun / 'config.json').write_text(json.dumps(kept))
    assert loop.train(tiny_recipe(steps=2), begun) == 'done'
    del kept['recipe']['train']['weight_decay']
    (begun / 'config.json').write_text(json.dumps(kept))
    with pytest.raises(UserError, match='train.weight_decay: 0.0 there, 0.1 in this recipe'):
        loop.train(tiny_recipe(steps=3, weight_decay=0.1), begun)


def test_what_is_missing_is_listed_at_once_with_its_commands(tmp_path):
    config = tiny_recipe('linear')
    config.teacher.path, config.inherit.path = str(tmp_path / 'no_teacher'), str(tmp_path / 'no_dit')
    config.data.name = 'latents'
    config.data.path = str(tmp_path / 'data')
    with pytest.raises(UserError) as caught:
        loop.train(config, tmp_path / 'run')
    for part in ('no_teacher', 'no_dit', 'convert_torch_ckpt.py', 'prepare_latents.py'):
        assert part in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original, calls = loop.BatchLayout.place, []

    def poison_fifth(self, batch):
        calls.append(1)
        if len(calls) == 5:
            batch['image'][0] = np.nan
        return original(self, batch)

    monkeypatch.setattr(loop.BatchLayout, 'place', poison_fifth)
    config = tiny_recipe(steps=8)
    config.log.every = 8
    message = r'step 5: loss/.* = nan.*first non-finite gradient: .*last good checkpoint is step 3'
    with pytest.raises(Diverged, match=message):
        loop.train(config, tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
    assert loop.run(config, tmp_path) == 0        # the file is sound: without the poison it goes on
