"""CAME against a restatement in numpy, and what else `make_optimizer` promises."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from jax.sharding import PartitionSpec as P
from tiny import PIXART, tiny_recipe

from lit_jax import recipes
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import setup
from lit_jax.training.came import scale_by_came
from lit_jax.training.mesh import make_mesh, state_shardings
from lit_jax.training.state import abstract_state, make_optimizer, new_state

MIXED = {'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1}


class OneTensor:
    """Algorithm 2 for one tensor as PyTorch holds it, a matrix [out, in] or a vector, in float64, sum by
    sum."""

    def __init__(self, shape):
        self.m = np.zeros(shape)
        self.v = np.zeros(shape)
        self.r, self.c = (np.zeros(shape[0]), np.zeros(shape[1])) if len(shape) == 2 else (None, None)
        self.R, self.C = (np.zeros(shape[0]), np.zeros(shape[1])) if len(shape) == 2 else (None, None)

    def step(self, g, b=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), d=1.0):
        if g.ndim == 1:
            self.v = b[1] * self.v + (1 - b[1]) * (g * g + eps[0])
            u = g / np.sqrt(self.v)
        else:
            out, into = g.shape
            for o in range(out):
                self.r[o] = b[1] * self.r[o] + (1 - b[1]) * sum(g[o, i] ** 2 + eps[0]
                                                                for i in range(into)) / into
            for i in range(into):
                self.c[i] = b[1] * self.c[i] + (1 - b[1]) * sum(g[o, i] ** 2 + eps[0]
                                                                for o in range(out)) / out
            u = g / np.sqrt(np.outer(self.r, self.c) / self.r.mean())
        u = u / max(1.0, np.sqrt((u * u).mean()) / d)
        self.m = b[0] * self.m + (1 - b[0]) * u
        if g.ndim == 1:
            return self.m
        s = (u - self.m) ** 2 + eps[1]
        self.R = b[2] * self.R + (1 - b[2]) * s.mean(1)
        self.C = b[2] * self.C + (1 - b[2]) * s.mean(0)
        return self.m / np.sqrt(np.outer(self.R, self.C) / self.R.mean())


# {path: (shape, shape of one tensor of PyTorch, leaf of one layer -> that tensor)}
LEAVES = {
    'y_embedder/fc1/kernel': ((5, 8), lambda g: g.T),
    'y_embedder/fc1/bias': ((8,), lambda g: g),
    't_block/kernel': ((4, 6, 4), lambda g: g.reshape(4, 24).T),
    't_block/bias': ((6, 4), lambda g: g.reshape(24)),
    'final_layer/scale_shift_table': ((2, 8), lambda g: g),
    'x_embedder/kernel': ((2, 2, 4, 8), lambda g: g.reshape(16, 8).T),
    'blocks/attn/qkv/kernel': ((3, 8, 3, 2, 4), lambda g: g.reshape(8, 24).T),
    'blocks/attn/qkv/bias': ((3, 3, 2, 4), lambda g: g.reshape(24)),
    'blocks/attn/proj/kernel': ((3, 2, 4, 8), lambda g: g.reshape(8, 8).T),
    'blocks/attn/dwc/kernel': ((3, 5, 5, 1, 4), lambda g: g.reshape(25, 4).T),
    'blocks/mlp/fc1/bias': ((3, 16), lambda g: g),
    'blocks/scale_shift_table': ((3, 6, 8), lambda g: g),
}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def gradients(steps, seed=0):
    """Of unlike size in rows and layers, so that a mean over the wrong axis shows."""
    rng = np.random.default_rng(seed)
    scales = {path: np.exp(rng.normal(size=shape) + 2 * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
              for path, (shape, _) in LEAVES.items()}
    return [{path: scale * (0.5 + rng.normal(size=scale.shape)) for path, scale in scales.items()}
            for _ in range(steps)]


def reference(steps):
    """{path: the update of the last step}, layer by layer."""
    tensors, last = {}, {}
    for grads in steps:
        for path, g in grads.items():
            layers = range(len(g)) if path.startswith('blocks') else [None]
            parts = []
            for layer in layers:
                to_torch = LEAVES[path][1]
                one = to_torch(g if layer is None else g[layer])
                parts.append(tensors.setdefault((path, layer), OneTensor(one.shape)).step(one))
            last[path] = parts
    return last


@pytest.mark.parametrize('dtype, bound', [(jnp.float32, 2e-5), (jnp.float64, 1e-11)])
def test_twenty_steps_equal_the_algorithm_tensor_by_tensor(dtype, bound):
    steps = gradients(20)
    with jax.enable_x64(dtype == jnp.float64):
        came = scale_by_came()
        update = jax.jit(came.update)
        state = came.init(nested({path: np.zeros(shape, dtype) for path, (shape, _) in LEAVES.items()}))
        for grads in steps:
            updates, state = update(nested({path: np.asarray(g, dtype) for path, g in grads.items()}), state)
    ours = named_leaves(updates)
    for path, parts in reference(steps).items():
        mine = np.asarray(ours[path])
        for layer, want in enumerate(parts):
            got = LEAVES[path][1](mine[layer] if path.startswith('blocks') else mine)
            assert got.dtype == dtype and np.abs(got - want).max() <= bound * np.abs(want).max(), (
                path, layer)


def test_the_state_is_little_more_than_the_mean():
    params = Network(PIXART).abstract()
    state = jax.eval_shape(make_optimizer(name='came', learning_rate=1e-3).init, params)[0]
    sizes = [sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
             for tree in (params, state.mu, state.nu)]
    assert sizes[1] == sizes[0] and sizes[2] < 0.25 * sizes[0]
    factored = state.nu['blocks']['attn']['kv']['kernel']
    assert {name: leaf.shape for name, leaf in factored.items()} == {
        'came_row': (3, 32), 'came_residual_row': (3, 32), 'came_column': (3, 2, 2, 16),
        'came_residual_column': (3, 2, 2, 16)}


def test_a_cut_state_makes_the_updates_of_a_whole_one():
    """Eight devices against one, three steps; means lie on every device, what has a parameter's shape lies
    like it."""
    abstract, rng = Network(PIXART).abstract(), np.random.default_rng(0)
    abstract = {'t_block': abstract['t_block'],
                # enough of it: eight devices compile for long
                'blocks': {'attn': abstract['blocks']['attn']}}
    optimizer = make_optimizer(name='came', learning_rate=1e-2, clip_norm=0.01, weight_decay=0.1,
                               arch=Network(PIXART).arch)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract)
    steps = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
             for _ in range(3)]
    shardings = state_shardings(jax.eval_shape(lambda: new_state(params, optimizer)), make_mesh(MIXED),
                                Network(PIXART).arch)
    inner = shardings['opt'][1][0]
    assert jax.tree.map(lambda s: s.spec, inner.mu) == jax.tree.map(lambda s: s.spec, shardings['params'])
    for path, sharding in named_leaves(inner.nu).items():
        if 'came_' in path:
            assert sharding.spec == P(), path

    def step(state, grads):
        updates, opt = optimizer.update(grads, state['opt'], state['params'])
        return {**state, 'params': optax.apply_updates(state['params'], updates), 'opt': opt}

    def run(put, jitted):
        state = put(jax.jit(lambda params: new_state(params, optimizer))(params))
        for grads in steps:
            state = jitted(state, grads)
        return state

    whole = run(lambda state: state, jax.jit(step))
    cut = run(lambda state: jax.device_put(state, shardings),
              jax.jit(step, donate_argnums=0, out_shardings=shardings))
    assert jax.tree.map(lambda leaf: leaf.sharding.spec,
                        cut['opt'][1][0].mu) == jax.tree.map(lambda s: s.spec, inner.mu)
    for (path, a), b in zip(named_leaves(whole).items(), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('name', ['adamw', 'came', 'muon'])
def test_a_regression_is_learned(name):
    """Two layers, noisy gradients: a tenth of the first loss after 600 steps."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    y = jnp.tanh(x @ jnp.asarray(rng.normal(size=(16, 32)) / 4,
                                 jnp.float32)) @ jnp.asarray(rng.normal(size=(32, 4)) / 6, jnp.float32)
    params = {'fc1': {'kernel': jnp.asarray(rng.normal(size=(16, 32)) / 4, jnp.float32),
                      'bias': jnp.zeros(32)},
              'fc2': {'kernel': jnp.zeros((32, 4)), 'bias': jnp.zeros(4)}}

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params['fc1']['kernel'] + params['fc1']['bias'])
        return jnp.square(hidden @ params['fc2']['kernel'] + params['fc2']['bias'] - y).mean()

    optimizer = make_optimizer(name=name, learning_rate=1e-3 if name == 'came' else 3e-3, warmup_steps=20)

    def step(carry, key):
        params, opt = carry
        rows = jax.random.randint(key, (32,), 0, 256)
        updates, opt = optimizer.update(jax.grad(loss)(params, x[rows], y[rows]), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    before = loss(params, x, y)
    (params, _), _ = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))(
        (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 600))
    assert loss(params, x, y) < 0.1 * before


def test_gradients_of_zero_and_rows_of_zeros_stay_finite():
    """Weights that are never used, dead inputs beside large gradients."""
    params = nested({'unused/kernel': jnp.ones((7, 4)), 'fc/kernel': jnp.ones((8, 4)),
                     'fc/bias': jnp.ones(4)})
    grads = jax.tree.map(jnp.zeros_like, params)
    grads['fc']['kernel'] = 1e6 * jnp.ones((8, 4)).at[3].set(0).at[:, 2].set(0)
    came = scale_by_came()
    state, update = came.init(params), jax.jit(came.update)
    for _ in range(3):
        updates, state = update(grads, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    assert not updates['unused']['kernel'].any() and not updates['fc']['kernel'][3].any()
    assert updates['fc']['kernel'][0, 0] > 0


def test_adamw_is_that_of_optax_bit_for_bit():
    """Updates and the structure of the state, which checkpoints hold."""
    params = {'a': {'kernel': normal(0, (4, 8))}, 'b': jnp.ones(3)}
    for decay in (0.0, 0.03):
        ours, theirs = make_optimizer(learning_rate=1e-3,
                                      weight_decay=decay), optax.adamw(1e-3, weight_decay=decay)
        mine, other = (params, ours.init(params)), (params, theirs.init(params))
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        update = [jax.jit(optimizer.update) for optimizer in (ours, theirs)]
        for seed in range(5):
            grads = jax.tree.map(lambda leaf, seed=seed: normal(seed, leaf.shape), params)
            moved = []
            for one, (weights, opt) in zip(update, (mine, other), strict=True):
                updates, opt = one(grads, opt, weights)
                moved.append((optax.apply_updates(weights, updates), opt))
            mine, other = moved
            jax.tree.map(np.testing.assert_array_equal, mine, other)


def test_a_recipe_names_its_optimizer():
    config = tiny_recipe(optimizer='came', clip_norm=0.01)
    state = abstract_state(setup.build_network(config), setup.build_optimizer(recipes.finalize(config, 8)))
    assert any('came_row' in path for path in named_leaves(state['opt']))
    state_shardings(state, make_mesh(MIXED), recipes.architecture(config))
    with pytest.raises(UserError, match="unknown train.optimizer 'lion'; known: adamw, came, muon"):
        recipes.finalize(tiny_recipe(optimizer='lion'), 8)
    with pytest.raises(UserError, match="unknown optimizer 'sgd'; known: adamw, came, muon"):
        make_optimizer(name='sgd', learning_rate=1e-3)
