"""Low-rank updates of frozen projections: a run begins with the unchanged model, trains only their factors,
resumes exactly, and gives merged weights to whoever loads it."""
import jax
import numpy as np
import pytest
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.checkpoint.load import load_updates, load_weights
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert
from lit_jax.models.low_rank import A, B, factor_names, is_update, merge_updates, with_updates
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, tree_bytes
from lit_jax.training import loop, setup
from lit_jax.training.mesh import make_mesh, state_shardings
from lit_jax.training.stages import plan_stages

ALONE = {'data': 1, 'fsdp': 1, 'tensor': 1, 'seq': 1}


def recipe(**train):
    config = tiny_recipe('linear', **{'steps': 4, 'trainable': 'mixers', 'lora_rank': 3, **train})
    config.checkpoint.every = 2
    return config


def last_stage(config):
    network = setup.build_network(config)
    return plan_stages(config, network)[-1], network


def test_frozen_projections_of_the_blocks_have_updates_and_nothing_else():
    stage, network = last_stage(recipe())
    factors = {name for name in stage.trained if is_update(name)}
    assert factors == set(factor_names([f'blocks/{name}/kernel' for name in ('mlp/fc1', 'mlp/fc2', 'adaLN')]))
    assert set(stage.trained) - factors == {name for name in named_leaves(network.abstract())
                                            if '/attn/' in name}
    state = stage.abstract(network, make_mesh(ALONE, jax.devices()[:1]))
    assert set(named_leaves(state['ema'])) == set(stage.trained)
    shapes = {name: leaf.shape for name, leaf in named_leaves(state['ema']).items() if is_update(name)}
    assert shapes['blocks/mlp/fc1/lora_a'] == (2, 32, 3) and shapes['blocks/mlp/fc1/lora_b'] == (2, 3, 128)
    assert shapes['blocks/adaLN/lora_b'] == (2, 3, 192)
    assert tree_bytes(state['opt']) < tree_bytes(state['params'])


def test_the_model_begins_unchanged_to_the_bit_and_updates_are_added():
    rng = np.random.default_rng(0)
    params = {'blocks': {'fc': {'kernel': rng.standard_normal((2, 4, 3, 5)).astype(np.float32),
                                'bias': np.ones((2, 3, 5), np.float32)}}}
    began = with_updates(params, {'blocks/fc/kernel': (1, 1)}, 2, seed=0)
    assert merge_updates(params) == params
    jax.tree.map(np.testing.assert_array_equal, merge_updates(began), params)
    a = np.asarray(began['blocks']['fc'][A])
    assert a.shape == (2, 4, 2) and 0 < np.abs(a).max() <= 0.5 and not np.array_equal(a[0], a[1])
    b = rng.standard_normal((2, 2, 15)).astype(np.float32)
    merged = merge_updates({'blocks': {'fc': {**began['blocks']['fc'], B: b}}})['blocks']['fc']
    np.testing.assert_allclose(merged['kernel'], params['blocks']['fc']['kernel'] + np.einsum(
        'sir,sro->sio', a, b).reshape(2, 4, 3, 5), rtol=1e-5, atol=1e-6)
    assert set(merged) == {'kernel', 'bias'}


@pytest.mark.parametrize('train, message', [
    ({'lora_rank': -1}, 'train.lora_rank.*at least 0'),
    ({'trainable': 'all'}, 'train.lora_rank 3 is for projections that are frozen.*train.trainable=mixers'),
    ({'trainable': 'blocks*/x'}, "no parameter is named 'blocks\\*/x'"),
    ({'trainable': '*'}, r"train.lora_rank 3: train.trainable '\*' leaves no projection .* frozen")])
def test_bad_ranks(train, message):
    with pytest.raises(UserError, match=message):
        last_stage(recipes.finalize(recipe(**train), 8))


@pytest.mark.parametrize('optimizer', ['adamw', 'came', 'muon'])
def test_factors_are_replicated_on_every_mesh(optimizer):
    stage, network = last_stage(recipe(optimizer=optimizer))
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'seq': 2})
    shardings = named_leaves(state_shardings(stage.abstract(network, mesh), mesh, network.arch))
    assert all(not any(one.spec) for name, one in shardings.items() if is_update(name))


# ------------------------------------------------------------------------------------------------------
# Runs


def state_of(workdir, step):
    with Checkpoints(workdir) as checkpoints:
        return {part: named_leaves(checkpoints.restore_part(part, step=step)[0])
                for part in ('params', 'ema')}


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    """The recipe of a student of a teacher that was trained: in a new model only the last layer learns."""
    teacher = tmp_path_factory.mktemp('teacher')
    loop.train(tiny_recipe(steps=2), teacher)
    config = recipe()
    config.inherit.path = str(teacher)
    return config


@pytest.fixture(scope='module')
def run(student, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    assert loop.train(student, workdir) == 'done'
    return workdir


@pytest.mark.slow
def test_only_mixers_and_factors_change(student, run):
    state, config = state_of(run, 4), recipes.finalize(student, 8)
    began = named_leaves(setup.init_params(config, setup.build_network(config), make_mesh(
        {**ALONE, 'data': 8}))[0])
    for name, leaf in state['params'].items():
        if not is_update(name):
            assert np.array_equal(leaf, began[name]) != ('/attn/' in name), name
    assert all(np.abs(leaf).max() > 0 for name, leaf in state['params'].items() if name.endswith(B))
    assert set(state['ema']) == {name for name in state['params'] if '/attn/' in name or is_update(name)}


@pytest.mark.slow
def test_a_run_resumes_exactly(student, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.cluster, 'asked_to_stop', lambda now: now >= 3)
        assert loop.train(student, tmp_path) == 'preempted'
    assert loop.train(student, tmp_path) == 'done'
    for part, leaves in state_of(tmp_path, 4).items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, state_of(run, 4)[part][name])


@pytest.mark.slow
def test_the_first_step_is_that_of_the_unchanged_model(tmp_path):
    """Its loss, to the bit."""
    losses = []
    for rank in (0, 3):
        config = recipe(lora_rank=rank, steps=1)
        config.log.every = 1
        loop.train(config, tmp_path / str(rank))
        losses.append(loop.read_lines(tmp_path / str(rank) / 'metrics.jsonl')[0]['loss/mse'])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_loaded_and_exported_weights_are_merged(run, tmp_path):
    _, params = load_weights(run)
    _, updates = load_updates(run)
    stored, loaded = state_of(run, 4)['params'], named_leaves(params)
    assert not any(map(is_update, loaded))
    for name in ('blocks/mlp/fc1/', 'blocks/adaLN/'):
        kernel = stored[f'{name}kernel']
        want = kernel + np.matmul(updates[name + A], updates[name + B]).reshape(kernel.shape)
        np.testing.assert_allclose(loaded[f'{name}kernel'], want, rtol=1e-6, atol=1e-7)
        assert not np.array_equal(loaded[f'{name}kernel'], kernel)
    export(run, tmp_path / 'student.safetensors')
    convert(tmp_path / 'student.safetensors', tmp_path / 'folder')
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / 'folder')[1], params)


@pytest.mark.slow
def test_another_optimizer_on_another_mesh_trains_them_too(tmp_path):
    config = recipe(optimizer='came', clip_norm=0.1, warmup_steps=1)
    config.mesh.update({'data': 2, 'fsdp': 2, 'tensor': 2})
    assert loop.train(config, tmp_path) == 'done'
    assert not any(map(is_update, named_leaves(load_weights(tmp_path)[1])))
