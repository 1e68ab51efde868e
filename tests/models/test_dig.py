"""DiG against the official code, and what the order of its tokens must be."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, random_tree
from goldens import weights
from tiers import quick

from lit_jax.diffusion.guidance import guide
from lit_jax.models.dig import ORDERS, PERIOD, Walk
from lit_jax.models.network import Network, count_parameters
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh, state_shardings

TINY = {'family': 'dig', 'depth': 6, 'width': 32, 'patch': 2, 'input_size': (8, 12), 'channels': 4,
        'num_classes': 3, 'mixer': {'name': 'gla', 'heads': 2}}


def stacked(state, key, shape=None):
    """The tensors blocks.{i}.`key` (Linears turned to [in, out]), reshaped, on a leading axis."""
    found = {int(name.split('.')[1]): tensor for name, tensor in state.items()
             if name.split('.', 2)[-1] == key}
    tensors = [found[i] for i in sorted(found)]
    if tensors[0].ndim == 2:
        tensors = [tensor.T for tensor in tensors]
    return np.stack([tensor.reshape(shape) if shape else tensor for tensor in tensors])


def block_params(state, width, heads):
    v_dim = state['blocks.0.attn.g_norm_swish_gate.weight'].shape[0]
    e_dim = state['blocks.0.attn.q_proj.weight'].shape[0] // heads
    keys, values = (width, heads, e_dim), (width, heads, v_dim)
    return {
        'attn': {
            'q': {'kernel': stacked(state, 'attn.q_proj.weight', keys)},
            'key': {'kernel': stacked(state, 'attn.k_proj.weight', keys)},
            'value': {'kernel': stacked(state, 'attn.v_proj.weight', values)},
            'gate': {'kernel': stacked(state, 'attn.g_proj.weight', values)},
            'decay_in': {'kernel': stacked(state, 'attn.gk_proj.0.weight')},
            'decay_out': {'kernel': stacked(state, 'attn.gk_proj.1.weight', (16, heads, e_dim)),
                          'bias': stacked(state, 'attn.gk_proj.1.bias', (heads, e_dim))},
            'norm_gain': stacked(state, 'attn.g_norm_swish_gate.weight'),
            'proj': {'kernel': stacked(state, 'attn.o_proj.weight', (heads, v_dim, width))}},
        'mlp': {'gate': {'kernel': stacked(state, 'mlp.gate_proj.weight', (width, 2, -1))},
                'down': {'kernel': stacked(state, 'mlp.down_proj.weight')}},
        'adaLN': {'kernel': stacked(state, 'adaLN_modulation.1.weight', (width, 6, width)),
                  'bias': stacked(state, 'adaLN_modulation.1.bias', (6, width))},
        'dwc': {'kernel': stacked(state, 'dw_conv.weight',
                                  (width, 9)).swapaxes(1, 2).reshape(-1, 3, 3, 1, width),
                'bias': stacked(state, 'dw_conv.bias')}}


def from_official(state, config):
    """(arch, params) of an official DiG state dict."""
    width, heads, patch = config['width'], config['heads'], config['patch']
    table = state['y_embedder.embedding_table.weight']

    def linear(key, shape=None):
        kernel, bias = state[f'{key}.weight'].T, state[f'{key}.bias']
        return {'kernel': kernel.reshape(width, *shape),
                'bias': bias.reshape(shape)} if shape else {'kernel': kernel, 'bias': bias}

    params = {
        'x_embedder': {'kernel': state['x_embedder.proj.weight'].transpose(2, 3, 1, 0),
                       'bias': state['x_embedder.proj.bias']},
        't_embedder': {'fc1': linear('t_embedder.mlp.0'), 'fc2': linear('t_embedder.mlp.2')},
        'y_embedder': {'table': table}, 'blocks': block_params(state, width, heads),
        'final_layer': {'adaLN': linear('final_layer.adaLN_modulation.1', (2, width)),
                        'linear': linear('final_layer.linear')}}
    if config['skip']:
        params['joins'] = {'kernel': stacked(state, 'skip_linear.weight'),
                           'bias': stacked(state, 'skip_linear.bias')}
    arch = {'family': 'dig', 'depth': config['depth'], 'width': width, 'patch': patch,
            'input_size': (config['input'],) * 2,
            'channels': config['in_channels'], 'num_classes': config['classes'],
            'mixer': {'name': 'gla', 'heads': heads}, 'skip': 'skip' if config['skip'] else 'none'}
    return arch, params


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def load_golden(path, dtype, **options):
    meta, state, arrays = weights.load(path)
    arch, params = from_official(state, meta['config'])
    arrays = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}
    network = Network(arch, dtype=dtype, **options)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, network.abstract())
    return network, jax.tree.map(lambda p: np.asarray(p, dtype), params), arrays


def check(network, params, arrays, bound):
    x, apply = np.asarray(arrays['in_x'], network.dtype), jax.jit(network.apply)
    got = apply(params, x, arrays['in_t'], {'label': arrays['in_y']})
    assert relative_error(got, arrays['out64_eps_v']) <= bound
    half = len(arrays['in_cfg_x']) // 2
    x, t, y = (np.asarray(arrays[f'in_cfg_{name}'][:half]) for name in ('x', 't', 'y'))
    for scale in (1.5, 4.0):
        model = guide(lambda x, t, cond: apply(params, x, t, cond), scale, network.guidance_pair)
        got = model(x.astype(network.dtype), t, {'label': y})
        # Guidance takes the difference of two outputs, scale times: so is their rounding.
        assert relative_error(got, arrays[f'out64_cfg_{scale}'][:half]) <= scale * bound


GOLDENS = ['dig_d4', 'dig_d8', 'dig_d8_skip']


@pytest.mark.parametrize('name, scan_layers', quick(itertools.product(GOLDENS, (True, False)), [
    ('dig_d8', True), ('dig_d8_skip', False)]))
def test_float32_equals_the_official_model(name, scan_layers, goldens):
    check(*load_golden(goldens / f'{name}.npz', jnp.float32, scan_layers=scan_layers), 2e-5)


@pytest.mark.parametrize('name', GOLDENS)
def test_float64_equals_the_official_model(name, goldens, x64):
    check(*load_golden(goldens / f'{name}.npz', jnp.float64), 1e-12)


def test_bfloat16_stays_near_float32(goldens):
    """Bound: four blocks of bfloat16 products (8 bits of mantissa) on outputs of order one."""
    network, params, arrays = load_golden(goldens / 'dig_d4.npz', jnp.bfloat16)
    output = jax.jit(network.apply)(params, arrays['in_x'], arrays['in_t'], {'label': arrays['in_y']})
    assert output.dtype == jnp.bfloat16 and relative_error(output, arrays['out64_eps_v']) <= 0.1


# ------------------------------------------------------------------------------------------------------
# The order of the tokens


def orders_of(name, grid, depth):
    """The tokens' numbers (rows first) in the order that each of `depth` blocks sees them."""
    walk, x, seen = Walk(grid, name), jnp.arange(grid[0] * grid[1])[None, :, None], []
    for i in range(depth):
        seen.append((np.asarray(x[0, :, 0]), walk.grid_at(i)))
        x = walk.turn(x, i)
    return seen, x


def test_the_official_order_reads_in_four_directions():
    rows = np.arange(6).reshape(2, 3)
    seen, _ = orders_of('official', (2, 3), 5)
    want = [rows.ravel(), rows.ravel()[::-1], rows.T.ravel(), rows.T.ravel()[::-1], rows.ravel()]
    for (got, _), order in zip(seen, want, strict=True):
        np.testing.assert_array_equal(got, order)
    assert [grid for _, grid in seen] == [(2, 3), (2, 3), (3, 2), (3, 2), (2, 3)]


@pytest.mark.parametrize('name', ORDERS)
@pytest.mark.parametrize('depth', range(9))
def test_every_order_is_undone_and_has_its_period(name, depth):
    grid = (2, 3)
    walk, tokens = Walk(grid, name), jnp.arange(6)[None, :, None]
    _, x = orders_of(name, grid, depth)
    np.testing.assert_array_equal(walk.back(x, depth), tokens)
    np.testing.assert_array_equal(walk.forth(tokens, depth), x)
    assert walk.grid_at(depth) == walk.grid_at(depth % PERIOD)


# ------------------------------------------------------------------------------------------------------
# The network


def random_params(network, seed=0):
    return random_tree(network.abstract(), seed, 0.2)


def value_and_gradient(network, params):
    x = normal(1, (2, *network.arch['input_size'], 4))

    def loss(params):
        return jnp.sin(network.apply(params, x, jnp.array([3, 900]), {'label': jnp.array([0, 3])})).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize('skip', ['none', 'skip'])
def test_a_scan_over_layers_and_remat_change_nothing(skip):
    arch = {**TINY, 'depth': 11, 'skip': skip}
    params = random_params(Network(arch))
    want = value_and_gradient(Network(arch, scan_layers=False), params)
    for options in ({}, {'remat': 'full'}):
        got = value_and_gradient(Network(arch, **options), params)
        errors = jax.tree.map(relative_error, got, want)
        # sums in another order, through eleven random blocks
        assert max(jax.tree.leaves(errors)) <= 1e-3


@pytest.mark.slow
def test_skips_that_start_at_zero_change_nothing():
    plain, skipped = Network(TINY), Network({**TINY, 'skip': 'skipzero'})
    params, joins = random_params(plain), jax.jit(skipped.init)(jax.random.key(0))['joins']
    assert joins['kernel'].shape == (2, 64, 32)
    x, rest = jnp.ones((1, 8, 12, 4)), (jnp.array([3]), {'label': jnp.array([0])})
    assert relative_error(jax.jit(skipped.apply)({**params, 'joins': joins}, x, *rest),
                          np.asarray(jax.jit(plain.apply)(params, x, *rest), np.float64)) <= 1e-4


def test_the_convolution_starts_as_the_identity():
    params = jax.device_get(jax.jit(Network(TINY).init)(jax.random.key(0)))['blocks']['dwc']
    assert params['kernel'].shape == (6, 3, 3, 1, 32) and (params['kernel'][:, 1, 1] == 1).all()
    assert params['kernel'].sum() == 6 * 32 and not params['bias'].any()
    assert 'dwc' not in Network({**TINY, 'local': 'none'}).abstract()['blocks']


@pytest.mark.parametrize('depth, width, heads, count', [
    (12, 384, 6, 33_081_632), (12, 768, 12, 130_748_192), (24, 1024, 16, 465_022_496),
    (28, 1152, 18, 675_953_952)])
def test_parameters_of_the_official_sizes(depth, width, heads, count):
    network = Network({'family': 'dig', 'depth': depth, 'width': width, 'patch': 2, 'input_size': (32, 32),
                       'channels': 4, 'num_classes': 1000, 'mixer': {'name': 'gla', 'heads': heads}})
    assert count_parameters(network) == count


@pytest.mark.parametrize('skip', ['none', 'skip'])
@pytest.mark.slow
def test_cut_over_devices_it_is_the_same(skip):
    network = Network({**TINY, 'skip': skip})
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1})
    params, x = random_params(network), normal(1, (4, 8, 12, 4))
    arguments = params, x, jnp.array([1, 2, 3, 4]), {'label': jnp.array([0, 1, 2, 3])}
    want = jax.jit(network.apply)(*arguments)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(network.abstract(), mesh, network.arch))
        got = jax.jit(network.apply)(placed, *arguments[1:])
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize('change, says', [
    ({'order': 'spiral'}, 'known: official, algorithm1'), ({'local': 'zero'}, 'known: identity'),
    ({'skip': 'all'}, 'known: none'),
    ({'mixer': {'name': 'linear', 'heads': 2}}, "family 'dig' has the mixer gla, not 'linear'")])
def test_wrong_options_are_explained(change, says):
    with pytest.raises(UserError, match=says):
        Network({**TINY, **change})
