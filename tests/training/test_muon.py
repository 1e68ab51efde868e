"""Muon against a restatement in numpy, which leaves it moves, and that a mesh changes nothing."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_matrices import networks
from tiny import PIXART, tiny_recipe

from lit_jax import recipes
from lit_jax.models.network import Network
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import setup
from lit_jax.training.mesh import make_mesh, state_shardings
from lit_jax.training.muon import is_for_muon, scale_by_muon_and_adam
from lit_jax.training.state import abstract_state, make_optimizer, new_state, scale_by_adamw

MIXED = {'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1}


class OneMatrix:
    """Muon for one matrix [inputs, outputs] in float64, as Jordan's text and Liu et al., eq. 4, state it."""

    def __init__(self, shape):
        self.sum, self.steps = np.zeros(shape), 0

    def step(self, g, beta=0.95):
        self.steps += 1
        self.sum = beta * self.sum + (1 - beta) * g
        ahead = beta * self.sum / (1 - beta ** (self.steps + 1)) + (1 - beta) * g / (1 - beta ** self.steps)
        x = ahead / np.linalg.norm(ahead)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x if x.shape == g.shape else x.T
        return 0.2 * np.sqrt(max(g.shape)) * x


# {path: (shape of a layer, leaf of one layer -> [inputs, outputs])}
LEAVES = {
    'blocks/attn/q/kernel': ((8, 2, 4), lambda g: g.reshape(8, 8)),
    'blocks/attn/kv/kernel': ((8, 2, 2, 4), lambda g: g.reshape(8, 16)),
    'blocks/attn/proj/kernel': ((2, 4, 8), lambda g: g.reshape(8, 8)),
    'blocks/mlp/fc2/kernel': ((32, 8), lambda g: g),
}


@pytest.fixture
def steps():
    rng = np.random.default_rng(0)
    return [{'blocks': nested_of(rng), 'fc': {'kernel': rng.normal(size=(8, 4))}} for _ in range(4)]


def nested_of(rng):
    tree = {}
    for path, (shape, _) in LEAVES.items():
        _, module, layer, _ = path.split('/')
        tree.setdefault(module, {})[layer] = {'kernel': rng.normal(size=(3, *shape)),
                                              'bias': rng.normal(size=(3, 8))}
    return tree


def test_matrices_of_the_blocks_equal_the_algorithm_layer_by_layer(steps, x64):
    optimizer = scale_by_muon_and_adam(scale_by_adamw())
    state = optimizer.init(jax.tree.map(jnp.asarray, steps[0]))
    want = {path: [OneMatrix(as_matrix(np.zeros(shape)).shape) for _ in range(3)]
            for path, (shape, as_matrix) in LEAVES.items()}
    for grads in steps:
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.asarray, grads), state)
        found, given = named_leaves(updates), named_leaves(grads)
        for path, (_, as_matrix) in LEAVES.items():
            for layer, one in enumerate(want[path]):
                np.testing.assert_allclose(as_matrix(np.asarray(found[path][layer])),
                                           one.step(as_matrix(given[path][layer])), rtol=1e-6, atol=1e-8,
                                           err_msg=path)
            assert 0.1 < np.sqrt(np.mean(np.square(found[path]))) < 0.25


def test_everything_else_moves_as_by_adam(steps):
    def others(tree):
        return {path: leaf for path, leaf in named_leaves(tree).items() if path not in LEAVES}

    both, adam = scale_by_muon_and_adam(scale_by_adamw()), scale_by_adamw()
    steps = [jax.tree.map(jnp.float32, grads) for grads in steps]
    state, other = both.init(steps[0]), adam.init(others(steps[0]))
    update, update_adam = jax.jit(both.update), jax.jit(adam.update)
    for grads in steps:
        updates, state = update(grads, state)
        want, other = update_adam(others(grads), other)
        assert set(want) == {'fc/kernel', *(path.replace('kernel', 'bias') for path in LEAVES)}
        jax.tree.map(np.testing.assert_array_equal, others(updates), want)


@pytest.mark.parametrize('arch', list(networks()))
def test_it_moves_the_products_of_the_blocks_in_every_system(arch):
    leaves = {path: leaf.ndim for path, leaf in named_leaves(Network(arch).abstract()).items()}
    moved = {path for path, rank in leaves.items() if is_for_muon(path, rank, arch)}
    assert any(path.endswith('/attn/proj/kernel')
               for path in moved) or not any('/attn/proj/kernel' in path for path in leaves)
    for path in moved:
        assert path.startswith(('blocks', 'joins')) and path.endswith('/kernel') and 'dwc' not in path
    # All that is left in the blocks are vectors, tables, and what is not multiplied with whole.
    left = [path for path in leaves if path.startswith('blocks') and path.endswith('kernel')
            and path not in moved]
    assert all('dwc' in path or 'depth' in path for path in left), left


def test_a_cut_state_makes_the_updates_of_a_whole_one():
    """Eight devices against one, two steps; a momentum lies like its parameter."""
    rng, abstract = np.random.default_rng(0), Network(PIXART).abstract()
    # eight devices compile for long
    abstract = {'t_block': abstract['t_block'], 'blocks': {'attn': abstract['blocks']['attn']}}
    optimizer = make_optimizer(name='muon', learning_rate=1e-2, clip_norm=0.1, weight_decay=0.1,
                               arch=Network(PIXART).arch)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract)
    steps = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
             for _ in range(2)]
    shardings = state_shardings(jax.eval_shape(lambda: new_state(params, optimizer)), make_mesh(MIXED),
                                Network(PIXART).arch)
    of_params = {path: sharding.spec for path, sharding in named_leaves(shardings['params']).items()}
    moments = [(path.split('/mu/')[1], sharding.spec)
               for path, sharding in named_leaves(shardings['opt']).items() if '/mu/' in path]
    assert sorted(path for path, _ in moments) == sorted(of_params)
    assert all(spec == of_params[path] for path, spec in moments)

    def step(state, grads):
        updates, opt = optimizer.update(grads, state['opt'], state['params'])
        return {**state, 'params': optax.apply_updates(state['params'], updates), 'opt': opt}

    whole = jax.jit(lambda params: new_state(params, optimizer))(params)
    cut = jax.device_put(whole, shardings)
    for grads in steps:
        whole = jax.jit(step)(whole, grads)
        cut = jax.jit(step, out_shardings=shardings)(cut, grads)
    for (path, a), b in zip(named_leaves(whole['params']).items(), jax.tree.leaves(cut['params']),
                            strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=path)


def test_a_recipe_names_it():
    config = tiny_recipe(optimizer='muon')
    state = abstract_state(setup.build_network(config), setup.build_optimizer(recipes.finalize(config, 8)))
    state_shardings(state, make_mesh(MIXED), recipes.architecture(config))
    second_moments = [path for path in named_leaves(state['opt']) if '/nu/' in path]
    assert second_moments and not any(is_for_muon(path.split('/nu/')[1], 3) for path in second_moments)
