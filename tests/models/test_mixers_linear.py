"""Linear attention against the paper's Algorithm 1, the official focused attention, and its own quadratic
form."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, graph, made, normal, pulled
from flax import nnx
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from tiers import BOTH_WIDTHS

from lit_jax.models.layers import Linear
from lit_jax.models.mixers import build_mixer, linear
from lit_jax.models.mixers.linear import EPS, LinearAttention, focus, linear_attention
from lit_jax.runtime.errors import UserError

GRIDS = ('h1_4x9_k3', 'h1_4x9_k5', 'h1_6x6_k5', 'h2_4x9_k3', 'h2_4x9_k5', 'h2_6x6_k5', 'h3_4x9_k3',
         'h3_4x9_k5', 'h3_6x6_k5', 'small_grid', 'deadheads')
LIT = tuple(f'lit_attn_{name}' for name in GRIDS)
FOCUSED = ('focused_relu_neutral', 'focused_relu_full', 'focused_gelu_neutral', 'focused_gelu_full')


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def golden_mixer(path, dtype):
    """(mixer with the golden weights, arrays, grid) of one golden file."""
    meta, torch, arrays = weights.load(path)
    case = meta['config']
    width, grid = case['dim'], tuple(case['grid'])
    head = (case['heads'], width // case['heads'])
    options = {'name': 'linear', 'heads': case['heads'], 'qkv_bias': case['bias'],
               'dwc_kernel': case['kernel']}
    if 'p' in case:
        options |= {'activation': case['act'], 'focus_power': case['p'], 'focus_scale': True,
                    'key_grid': grid}
    graphdef = graph(lambda: build_mixer(options, width, dtype=dtype, rngs=nnx.Rngs(0)))
    params = {'q': {'kernel': torch['q.weight'].T.reshape(width, *head)},
              'kv': {'kernel': torch['kv.weight'].T.reshape(width, 2, *head)},
              'proj': {'kernel': torch['proj.weight'].T.reshape(*head, width), 'bias': torch['proj.bias']},
              'dwc': {'kernel': torch['dwc.weight'].transpose(2, 3, 1, 0), 'bias': torch['dwc.bias']}}
    if case['bias']:
        params['q']['bias'] = torch['q.bias'].reshape(head)
        params['kv']['bias'] = torch['kv.bias'].reshape(2, *head)
    if 'p' in case:
        params['focus_scale'] = torch['scale'].reshape(head)
        params['key_table'] = torch['positional_encoding'].reshape(-1, *head)
    return nnx.merge(graphdef, params), arrays, grid


@BOTH_WIDTHS
@pytest.mark.parametrize('name', [*LIT, *FOCUSED])
def test_output_is_the_official_one(name, wide, goldens):
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        mixer, arrays, grid = golden_mixer(goldens / f'{name}.npz', dtype)
        got = jax.jit(lambda x: mixer(x, grid))(np.asarray(arrays['in_x'], dtype))
        assert got.dtype == dtype
        assert relative(got, arrays['out64_y']) <= (1e-9 if wide else 2e-5)


@pytest.mark.parametrize('name', LIT)
def test_every_step_of_algorithm_1(name, goldens, x64):
    mixer, arrays, grid = golden_mixer(goldens / f'{name}.npz', jnp.float64)

    def steps(x):
        kv = mixer.kv(x)
        q, k, v = mixer.features(mixer.q(x)), mixer.features(kv[:, :, 0]), kv[:, :, 1]
        return {'q': q.swapaxes(1, 2), 'k': k.swapaxes(1, 2),
                'linear': linear_attention(q, k, v).reshape(x.shape),
                'dwc': mixer.dwc(v.reshape(len(x), *grid, *v.shape[2:])).reshape(x.shape)}

    for step, got in jax.jit(steps)(np.asarray(arrays['in_x'], jnp.float64)).items():
        assert relative(got, arrays[f'mid_{step}']) < 1e-12, step


@pytest.mark.parametrize('name', FOCUSED)
def test_focusing_acts_on_all_heads_together(name, goldens, x64):
    mixer, arrays, _ = golden_mixer(goldens / f'{name}.npz', jnp.float64)
    x = np.asarray(arrays['in_x'], jnp.float64)
    q, k = jax.jit(lambda x: (mixer.features(mixer.q(x)),
                              mixer.features(mixer.kv(x)[:, :, 0], mixer.key_table)))(x)
    assert relative(q.reshape(x.shape), arrays['mid_q_focused']) < 1e-12
    assert relative(k.reshape(x.shape), arrays['mid_k_focused']) < 1e-12


@given(batch=st.integers(1, 2), tokens=st.integers(1, 12), heads=st.integers(1, 4),
       channels=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_equals_the_quadratic_form(batch, tokens, heads, channels, seed):
    with jax.enable_x64(True):
        q, k, v = np.random.default_rng(seed).normal(size=(3, batch, tokens, heads, channels))
        q, k = np.maximum(q, 0) + EPS, np.maximum(k, 0) + EPS
        pairs = np.einsum('bqke,bnke->bkqn', q, k)
        # Algorithm 1 adds its epsilon to the mean over tokens, hence N·1e-6 to the sum.
        rows = pairs / (pairs.sum(-1, keepdims=True) + tokens * EPS)
        want = np.einsum('bkqn,bnke->bqke', rows, v)
        np.testing.assert_allclose(jax.jit(linear_attention)(*map(jnp.asarray, (q, k, v))), want, atol=1e-12)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), heads=st.sampled_from([1, 2, 3, 4, 6, 12]),
       kernel=st.sampled_from([0, 3, 5]), bias=st.booleans(), power=st.sampled_from([0, 3]),
       activation=st.sampled_from(['relu', 'gelu']))
@settings(max_examples=6, deadline=None)
def test_any_heads_grid_and_options(rows, columns, heads, kernel, bias, power, activation):
    mixer = made(lambda: build_mixer({'name': 'linear', 'heads': heads, 'qkv_bias': bias,
                                      'dwc_kernel': kernel, 'activation': activation, 'focus_power': power},
                                     12, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(mixer))
    assert ('dwc' in params) == (kernel > 0)
    assert ('bias' in params['q']) == ('bias' in params['kv']) == bias
    x = normal(1, (2, rows * columns, 12))
    out = jax.jit(lambda x: mixer(x, (rows, columns)))(x)
    assert out.shape == x.shape and np.isfinite(out).all()


def test_without_convolution_the_order_of_tokens_does_not_matter():
    mixer = made(lambda: build_mixer({'name': 'linear', 'heads': 2, 'dwc_kernel': 0}, 8, dtype=jnp.float32,
                                     rngs=nnx.Rngs(0)))
    x = normal(0, (1, 12, 8))
    order = np.random.default_rng(0).permutation(12)
    # Only the order of float32 sums differs.
    np.testing.assert_allclose(applied(mixer, x[:, order], (3, 4)), applied(mixer, x, (2, 6))[:, order],
                               atol=1e-5)


def test_the_convolution_sees_the_grid():
    mixer = made(lambda: build_mixer({'name': 'linear', 'heads': 2}, 8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = normal(0, (1, 12, 8))
    assert np.abs(applied(mixer, x, (3, 4)) - applied(mixer, x, (4, 3))).max() > 1e-2


@pytest.mark.parametrize('options',
                         [{}, {'dwc_kernel': 0, 'qkv_bias': True}, {'focus_power': 3, 'activation': 'gelu'},
                          {'focus_power': 3, 'focus_scale': True, 'key_grid': (2, 3)}], ids=str)
def test_gradients_are_those_of_finite_differences(options, x64):
    mixer = made(lambda: build_mixer({'name': 'linear', 'heads': 2, **options}, 4, dtype=jnp.float64,
                                     rngs=nnx.Rngs(3)))
    graphdef, params = nnx.split(mixer)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.to_pure_dict(params))
    x = normal(2, (1, 6, 4), jnp.float64)
    apply = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, (2, 3)))
    check_grads(apply, (params, x), order=1, modes=['rev'], atol=1e-5, rtol=1e-5, eps=1e-6)


def gradient_errors(tokens, width=32):
    """Relative L2 error of each gradient in bfloat16 against that in float32, of the same rounded numbers.
    Tokens share a direction, as in trained models: what the rounding of a sum adds is the same for all."""
    rng = np.random.default_rng(3)
    x, target = (jnp.asarray(rng.normal(size=(1, *tokens, width)).reshape(1, -1, width) + mean, jnp.bfloat16)
                 for mean in (0.5, 0.0))
    found = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        graphdef, params = nnx.split(made(lambda dtype=dtype: LinearAttention(width, heads=1, dwc_kernel=0,
                                                                              dtype=dtype, rngs=nnx.Rngs(0))))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32),
                              nnx.to_pure_dict(params))

        def loss(params, dtype=dtype, graphdef=graphdef):
            y = nnx.merge(graphdef, params)(x.astype(dtype), tokens)
            return (y.astype(jnp.float32) * target.astype(jnp.float32)).sum()

        found[dtype] = jax.jit(jax.grad(loss))(params)
    return {'/'.join(key.key for key in path): np.linalg.norm(got - want) / np.linalg.norm(want)
            for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(found[jnp.bfloat16]),
                                         jax.tree.leaves(found[jnp.float32]), strict=True)}


@pytest.mark.slow
def test_gradients_in_bfloat16_at_65536_tokens():
    """Rounded states were 3 % off there, sums of biases 5 %."""
    errors = gradient_errors((256, 256))
    assert max(errors.values()) < 1e-2 and errors['proj/bias'] < 1e-3, errors


def test_a_bias_is_summed_over_tokens_in_float32():
    layer = Linear(1, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(jnp.ones((1, 4099, 1))).astype(jnp.float32).sum())(
        params)
    assert gradient['bias'][...] == 4099


def test_sums_that_are_not_rounded_have_the_derivatives_of_those_that_are(monkeypatch):
    q, k, v = (normal(seed, (1, 2, 48, 8), jnp.float32) for seed in range(3))
    v = v.astype(jnp.bfloat16)

    def both(q, k, v):
        value, pull = jax.vjp(linear.weighted_sum, q, jnp.abs(k), v)
        return value, *pull(jnp.cos(value))

    want = jax.jit(both)(q, k, v)
    monkeypatch.setattr(linear, 'EXACT_TOKENS', 32)
    got = jax.jit(lambda *a: both(*a))(q, k, v)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and 0 < relative(a, np.asarray(b, np.float64)) < 2e-2


@pytest.mark.parametrize('dwc_kernel', [5, 0])
def test_bfloat16_at_16384_tokens(dwc_kernel, x64):
    """Inputs of size 100, relative to float64 with the same float32 weights."""
    side, width = 128, 64
    options = {'name': 'linear', 'heads': 2, 'dwc_kernel': dwc_kernel, 'qkv_bias': True}
    x = 100 * normal(0, (1, side * side, width), jnp.float32)
    x = x + 50                      # with a common part, so that sums over tokens grow
    outputs, gradients = {}, {}
    for dtype in (jnp.bfloat16, jnp.float64):
        graphdef, params = nnx.split(made(
            lambda dtype=dtype: build_mixer(options, width, dtype=dtype, rngs=nnx.Rngs(0))))

        def apply(params, x, graphdef=graphdef):
            return nnx.merge(graphdef, params)(x, (side, side))

        outputs[dtype], gradients[dtype] = pulled(apply, params, x.astype(jnp.bfloat16).astype(dtype))
    assert outputs[jnp.bfloat16].dtype == jnp.bfloat16
    want = np.asarray(outputs[jnp.float64])
    error = np.asarray(outputs[jnp.bfloat16], np.float64) - want
    assert np.linalg.norm(error) / np.linalg.norm(want) <= 1e-2
    assert np.abs(error).max() / np.abs(want).max() <= 1e-2
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients[jnp.bfloat16]))


def test_sums_over_tokens_are_float32():
    # 4096 keys of one: a bfloat16 sum would stop growing at 256, and the mean of v would come out 16 times
    # too small.
    ones = jnp.ones((1, 4096, 1, 4), jnp.bfloat16)
    out = jax.jit(linear_attention)(ones.astype(jnp.float32), ones.astype(jnp.float32), ones)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1, rtol=1e-5)       # 1e-6 in the normaliser, 4e-6 of it is float32


def test_focus_keeps_the_norm_and_sharpens():
    x = jnp.array([3.0, 1.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    out = focus(x, 3).reshape(-1)
    np.testing.assert_allclose(jnp.linalg.norm(out), np.sqrt(10), rtol=1e-6)
    np.testing.assert_allclose(out[1] / out[0], 1 / 27, rtol=1e-6)
    np.testing.assert_allclose(focus(x, 1), x, rtol=1e-6)


def test_focus_of_dead_features_does_not_vanish_in_float32():
    # φ = 0 everywhere leaves 1e-6: its sixth power underflows, its direction must not.
    dead = jnp.full((1, 1, 2, 2), 1e-6)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: focus(x, 3)[0, 0, 0, 0]))(dead)
    np.testing.assert_allclose(value, 1e-6, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_initial_bounds():
    width, heads, size = 96, 3, 5
    params = nnx.to_pure_dict(nnx.state(made(
        lambda: LinearAttention(width, heads=heads, qkv_bias=True, dwc_kernel=size, rngs=nnx.Rngs(0)))))
    # kv is one fused matrix for Xavier, q and proj are square; the convolution has PyTorch's default, bias
    # included.
    bounds = {'q': np.sqrt(6 / (2 * width)), 'kv': np.sqrt(6 / (3 * width)), 'proj': np.sqrt(6 / (2 * width)),
              'dwc': 0.2}
    shapes = {'q': (width, heads, 32), 'kv': (width, 2, heads, 32), 'proj': (heads, 32, width),
              'dwc': (5, 5, 1, 32)}
    for name, bound in bounds.items():
        kernel = params[name]['kernel']
        assert kernel.shape == shapes[name] and kernel.dtype == jnp.float32
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.mean()) < 0.05 * bound
    assert 0.5 * 0.2 < np.abs(params['dwc']['bias']).max() <= 0.2
    assert not any(np.any(params[name]['bias']) for name in ('q', 'kv', 'proj'))


@pytest.mark.parametrize('options, says', [
    ({'dwc_kernel': 4}, 'dwc_kernel must be odd'),
    ({'dwc_kernel': -1}, 'dwc_kernel must be odd'),
    ({'dwc_kernel': 2.5}, 'dwc_kernel must be odd'),
    ({'activation': 'swish'}, 'known: relu, gelu'),
    ({'focus_power': -3}, 'focus_power'),
    ({'focus_scale': True}, 'set focus_power'),
    ({'heads': 3}, 'possible: 1, 2, 4, 8'),
    ({'kernel': 5}, "no option 'kernel'"),
])
def test_wrong_options_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        build_mixer({'name': 'linear', 'heads': 2, **options}, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_tokens_must_fill_the_grid():
    mixer = build_mixer({'name': 'linear', 'heads': 2}, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match='12 tokens do not fill a grid of 3 x 5'):
        mixer(jnp.zeros((1, 12, 8)), (3, 5))
