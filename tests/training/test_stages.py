"""Alignment before training: what it trains, what it refuses, and that a run resumes on both sides of it."""
import jax
import numpy as np
import pytest
from tiny import tiny_recipe

import lit_jax
from lit_jax import recipes
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import loop, setup
from lit_jax.training.stages import plan_stages, stage_at
from lit_jax.training.state import trainable_leaves
from lit_jax.training.telemetry import read_lines


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('teacher')
    loop.train(tiny_recipe(steps=2), workdir)
    return workdir


def student(teacher, align=3, **train):
    config = tiny_recipe('linear', **{'steps': 3, **train})
    config.teacher.path = config.inherit.path = str(teacher)
    config.align.steps, config.align.learning_rate, config.align.optimizer = align, 1e-2, 'muon'
    return config


def run_until(config, workdir, step, monkeypatch):
    """Runs with the steps of `config`, asked to stop after `step`."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.cluster, 'asked_to_stop', lambda now: now >= step)
        assert loop.train(config, workdir) == 'preempted'


def stored(config, workdir, step):
    """The state of a checkpoint, whatever its stage."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_part('params', step=step)[0], checkpoints.restore_part('ema', step=step)[0]


@pytest.mark.slow
@pytest.mark.parametrize('stop_after', [2, 3, 4])
def test_a_run_resumes_exactly_before_at_and_after_the_border(teacher, tmp_path, stop_after, monkeypatch):
    config = student(teacher)
    assert loop.train(config, tmp_path / 'straight') == 'done'
    run_until(config, tmp_path / 'stopped', stop_after, monkeypatch)
    assert loop.train(config, tmp_path / 'stopped') == 'done'
    for one, other in zip(stored(config, tmp_path / 'straight', 6), stored(config, tmp_path / 'stopped', 6),
                          strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    losses = [[{name: value for name, value in line.items() if name.startswith(('loss', 'align'))}
               for line in read_lines(tmp_path / name / 'metrics.jsonl')] for name in ('straight', 'stopped')]
    assert losses[0] == losses[1] and 'align/error_01' in losses[0][0] and 'loss/mse' in losses[0][-1]


@pytest.mark.slow
def test_alignment_changes_mixers_only_and_keeps_nothing_for_the_rest(teacher, tmp_path, monkeypatch):
    config = student(teacher, align=30)
    run_until(config, tmp_path, 20, monkeypatch)
    params, ema = stored(config, tmp_path, 20)
    began, _ = setup.init_params(recipes.finalize(config, 8), setup.build_network(config),
                                 loop.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1, 'seq': 1}))
    began = named_leaves(jax.device_get(began))
    for name, leaf in named_leaves(params).items():
        assert np.array_equal(leaf, began[name]) != ('/attn/' in name), name
    assert {*named_leaves(ema)} == {name for name in began if '/attn/' in name}
    model = lit_jax.load(tmp_path)      # the rest of its weights are the parameters
    np.testing.assert_array_equal(model.params['final_layer']['linear']['kernel'],
                                  params['final_layer']['linear']['kernel'])
    errors = [line['align/error_00'] for line in read_lines(tmp_path / 'metrics.jsonl')]
    assert errors[-1] < 0.8 * errors[0]


def network(**model):
    config = tiny_recipe('linear')
    for name, value in model.items():
        config.model[name] = value
    return config, setup.build_network(config)


TEACHER = {**tiny_recipe().model.to_dict(), 'input_size': (8, 8), 'channels': 1, 'num_classes': 10}


@pytest.mark.parametrize('model, teacher, message', [
    ({}, None, 'align.steps 5 needs a teacher'),
    ({'depth': 3}, TEACHER, 'depth 3.*the teacher .*depth 2'),
    ({'width': 64}, TEACHER, 'width 64.*the teacher .*width 32'),
    ({'mixer': recipes.softmax_mixer(2)}, TEACHER, "all mixers are the teacher's")])
def test_what_cannot_be_aligned(model, teacher, message):
    config, student = network(**model)
    config.align.steps = 5
    with pytest.raises(UserError, match=message):
        plan_stages(config, student, teacher and Network(teacher).arch)


def test_blocks_need_their_own_of_the_teacher():
    config, student = network(width=64)
    config.teacher.lambda_blocks = 1.0
    with pytest.raises(UserError, match=r'width 64.*the teacher .*width 32.*or teacher.lambda_blocks=0'):
        plan_stages(config, student, Network(TEACHER).arch)


def test_stages_follow_each_other_and_kept_blocks_are_not_aligned():
    kept = {'depth': 1, 'mixer': recipes.softmax_mixer(2).to_dict()}
    config, student = network(stages=({'depth': 1}, kept))
    config.align.steps, config.train.steps = 5, 7
    align, train = stages = plan_stages(config, student, Network(TEACHER).arch)
    assert (align.first, align.last, train.first, train.last) == (1, 5, 6, 12)
    assert [stage_at(stages, step).name for step in (1, 5, 6, 12)] == ['align', 'align', 'train', 'train']
    assert align.trained and all(name.startswith('blocks0/attn/') for name in align.trained)


def test_trainable_leaves():
    params = network()[1].abstract()
    assert trainable_leaves('all', params) == tuple(named_leaves(params))
    assert trainable_leaves('mixers', params) == tuple(n for n in named_leaves(params) if '/attn/' in n)
    for nothing in ('', ' , '):
        with pytest.raises(UserError, match='which freezes everything'):
            trainable_leaves(nothing, params)
    with pytest.raises(UserError, match="no parameter is named 'block/.*there are"):
        trainable_leaves('final_layer/*, block/x', params)
