"""The backbone against the official code, and against what the papers say about it."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, random_tree
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import quick

from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.guidance import guide
from lit_jax.models.arch import mixers_of
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError

MODELS = ['dit_a', 'dit_p4', 'lit_model', 'lit_model_bias']
TINY = {'family': 'dit', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 3,
        'num_classes': 3,
        'mixer': {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 5, 'activation': 'relu',
                  'focus_power': 0}}


def load_golden(path, dtype, **options):
    """(network, params, arrays) of a golden model file in NHWC; the official run's dtype decides what is
    compared."""
    meta, state, arrays = weights.load(path)
    arch, params = from_torch_state(state, heads=meta['config']['heads'],
                                    input_size=(meta['config']['input'],) * 2)
    arrays = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}
    return Network(arch, dtype=dtype,
                   **options), jax.tree.map(lambda p: np.asarray(p, dtype), params), arrays


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def outputs(network, params, arrays):
    """Plain forward and both guided forwards, in the order of the golden file."""
    dtype, apply = network.dtype, jax.jit(network.apply)
    x, t, y = np.asarray(arrays['in_x'], dtype), arrays['in_t'], arrays['in_y']
    yield 'eps_v', apply(params, x, t, {'label': y})
    half = len(arrays['in_cfg_x']) // 2   # the second half is the null half, which `guide` makes itself
    x, t, y = (np.asarray(arrays[f'in_cfg_{name}'][:half]) for name in ('x', 't', 'y'))
    for scale in (1.5, 4.0):
        model = guide(lambda x, t, cond: apply(params, x, t, cond), scale, network.guidance_pair)
        yield f'cfg_{scale}', model(x.astype(dtype), t, {'label': y})


@pytest.mark.parametrize('name, scan_layers', quick(itertools.product(MODELS, (True, False)), [
    *((name, True) for name in MODELS), ('lit_model_bias', False)]))
def test_float32_equals_the_official_model(name, scan_layers, goldens):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float32, scan_layers=scan_layers)
    for key, got in outputs(network, params, arrays):
        want = arrays[f'out64_{key}']
        assert relative_error(got, want[:len(got)]) <= 2e-5, key


@pytest.mark.parametrize('name', MODELS)
def test_float64_equals_the_official_model(name, goldens, x64):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float64)
    for key, got in outputs(network, params, arrays):
        want = arrays[f'out64_{key}']
        assert got.dtype == jnp.float64
        assert relative_error(got, want[:len(got)]) <= 1e-9, key


@pytest.mark.parametrize('mixer', [TINY['mixer'], {'name': 'softmax', 'heads': 2, 'qkv_bias': True}])
def test_output_is_exactly_zero_at_initialisation(mixer):
    network = Network({**TINY, 'mixer': mixer})
    params = jax.jit(network.init)(jax.random.key(0))
    x = normal(1, (2, 8, 8, 3))
    assert (jax.jit(network.apply)(params, x, jnp.array([1, 999]), {'label': jnp.array([0, 3])}) == 0).all()


def random_params(network, seed=0):
    """Weights of order 1/sqrt(fan_in) everywhere, zero-initialised gates included."""
    return random_tree(network.abstract(), seed, 0.2)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.sampled_from([1, 2, 4]),
       channels=st.integers(1, 4))
@settings(max_examples=5, deadline=None)
def test_any_grid_gives_an_output_of_twice_the_channels(rows, columns, patch, channels):
    size = (rows * patch, columns * patch)
    network = Network({**TINY, 'input_size': size, 'patch': patch, 'channels': channels})
    output = jax.jit(network.apply)(random_params(network), np.ones((2, *size, channels), np.float32),
                           np.array([0, 7]), {'label': np.array([0, 1])})
    assert output.shape == (2, *size, 2 * channels)
    assert np.isfinite(output).all()


def test_remat_changes_nothing():
    x, cond = jnp.ones((2, 8, 8, 3)), {'label': jnp.array([0, 1])}

    def gradient(remat):
        network = Network(TINY, remat=remat)
        return jax.jit(jax.grad(lambda p: (network.apply(p, x, jnp.array([3, 4]), cond) ** 2).sum()))(
            random_params(network))

    want = gradient('none')
    # the same sums in another order; a leaf far up amplifies rounding
    for remat in ('full', 'dots', 'dots_no_batch'):
        errors = jax.tree.map(relative_error, gradient(remat), want)
        assert max(jax.tree.leaves(errors)) <= 1e-4


def test_bfloat16_stays_near_float32(goldens):
    """Bound: three blocks of bfloat16 products (8 bits of mantissa) on outputs of order one."""
    network, params, arrays = load_golden(goldens / 'lit_model.npz', jnp.bfloat16)
    params = jax.tree.map(lambda p: np.asarray(p, np.float32), params)
    output = jax.jit(network.apply)(params, arrays['in_x'], arrays['in_t'], {'label': arrays['in_y']})
    assert output.dtype == jnp.bfloat16
    assert relative_error(output, arrays['out64_eps_v']) <= 5e-2


def staged(mixer, stages=(), **more):
    return Network({'family': 'dit', 'depth': 4, 'width': 32, 'patch': 2, 'input_size': (8, 12),
                    'channels': 4, 'num_classes': 3, 'mixer': mixer, 'stages': stages, **more})


def test_runs_of_unlike_blocks_equal_one_run_of_like_ones():
    mixer = {'name': 'linear', 'heads': 2, 'dwc_kernel': 3}
    whole, cut = staged(mixer), staged(mixer, [{'depth': 1}, {'depth': 3, 'mixer': {'dwc_kernel': 3}}])
    params = jax.device_get(jax.jit(whole.init)(jax.random.key(0)))
    parts = {name: leaf for name, leaf in params.items() if name != 'blocks'}
    parts |= {'blocks0': jax.tree.map(lambda leaf: leaf[:1], params['blocks']),
              'blocks1': jax.tree.map(lambda leaf: leaf[1:], params['blocks'])}
    x = normal(1, (2, 8, 12, 4))
    arguments = x, jnp.array([3, 900]), {'label': jnp.array([0, 3])}
    assert jax.tree.structure(parts) == jax.tree.structure(cut.abstract())
    np.testing.assert_allclose(jax.jit(cut.apply)(parts, *arguments),
                               jax.jit(whole.apply)(params, *arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('stages, said', [
    ([{'depth': 1}, {'depth': 2}], '1 + 2 blocks, model.depth is 4'),
    ([{'depth': 4, 'heads': 2}], 'not heads'), (2, 'must be runs of blocks'), ('every:2', 'short form'),
    ([{'depth': '2'}, {'depth': 2}], 'model.depth is 4'), ([{'depth': 4, 'mixer': 2}], 'must be options'),
    ([{'depth': 2}, {'depth': 2, 'mixer': {'name': 'softmax'}}], "'softmax' needs heads"),
    ([{'depth': 2}, {'depth': 2, 'mixer': {'name': 'softmax', 'heads': 4, 'dwc_kernel': 3}}], 'no option')])
def test_runs_that_cannot_be_are_refused(stages, said):
    with pytest.raises(UserError, match=said.replace('+', r'\+')):
        staged({'name': 'linear', 'heads': 2}, stages)


def test_a_stage_of_another_kind_starts_from_its_own_defaults():
    base = {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 3, 'activation': 'relu'}
    network = staged(base, [{'depth': 3}, {'depth': 1, 'mixer': {'name': 'softmax', 'heads': 4}}])
    assert mixers_of(network.arch) == [base, {'name': 'softmax', 'heads': 4}]
    assert network.abstract()['blocks1']['attn']['qkv']['bias'].shape == (1, 3, 4, 8)


def test_an_unknown_ffn_is_refused():
    with pytest.raises(UserError, match=r"unknown model.ffn 'mpl' \(did you mean mlp\?\); known: mlp"):
        staged({'name': 'linear', 'heads': 2}, ffn='mpl')
