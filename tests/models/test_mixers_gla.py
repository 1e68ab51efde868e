"""Gated linear attention: the chunked form against the recurrence and the official code, and what its options
mean."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, made, normal
from flax import nnx
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.arch import check_arch, check_partition
from lit_jax.models.mixers import build_mixer, gla_mild
from lit_jax.models.mixers.gla import DIRECTIONS
from lit_jax.models.mixers.gla_chunked import chunked_gla, recurrent_gla
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh


def step_by_step(q, k, v, g, cotangent):
    """o, the last state, and Σ o·cotangent differentiated by q, k, v, g: numpy, float64, one token after the
    other."""
    q, k, v, g, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, g, cotangent))
    alpha, states = np.exp(g), [np.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))]
    for t in range(q.shape[1]):
        states.append(alpha[:, t, :, :, None] * states[-1] + k[:, t, :, :, None] * v[:, t, :, None])
    o = np.stack([np.einsum('bke,bkev->bkv', q[:, t], states[t + 1]) for t in range(q.shape[1])], 1)
    d_q, d_k, d_v, d_g = (np.zeros(a.shape) for a in (q, k, v, g))
    d_state = np.zeros_like(states[0])
    for t in reversed(range(q.shape[1])):
        d_q[:, t] = np.einsum('bkev,bkv->bke', states[t + 1], cotangent[:, t])
        d_state += q[:, t, :, :, None] * cotangent[:, t, :, None]
        d_k[:, t] = np.einsum('bkev,bkv->bke', d_state, v[:, t])
        d_v[:, t] = np.einsum('bkev,bke->bkv', d_state, k[:, t])
        d_g[:, t] = alpha[:, t] * (d_state * states[t]).sum(-1)
        d_state *= alpha[:, t, :, :, None]
    return o, states[-1], (d_q, d_k, d_v, d_g)


def random_inputs(tokens, low, high, *, batch=1, heads=2, e_dim=4, v_dim=6, seed=0):
    """q, k, v, g, cotangent in float32; log10 of the gates uniform between `low` and `high`."""
    rng = np.random.default_rng(seed)
    q, k, v, cotangent = (rng.normal(size=(batch, tokens, heads, d)).astype(np.float32)
                          for d in (e_dim, e_dim, v_dim, v_dim))
    g = (np.log(10) * rng.uniform(low, high, size=q.shape)).astype(np.float32)
    return q, k, v, g, cotangent


def relative(got, want, size=1e-30):
    """The largest difference over the largest number; `size` where that is of terms which cancel."""
    return np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), size)


@functools.partial(jax.jit, static_argnames='chunk')
def in_chunks(inputs, cotangent, chunk):
    """o, the last state, and Σ o·cotangent differentiated by the inputs."""
    (o, last), pull = jax.vjp(lambda *a: chunked_gla(*a, chunk=chunk), *inputs)
    return o, last, pull((cotangent, jnp.zeros_like(last)))


def compare(inputs, chunk, bound):
    *inputs, cotangent = inputs
    o, last, gradients = in_chunks(inputs, cotangent, chunk)
    want_o, want_last, want = step_by_step(*inputs, cotangent)
    assert relative(o, want_o) <= bound
    assert relative(last, want_last) <= bound
    for name, a, b in zip('qkv', gradients, want, strict=False):
        assert relative(a, b) <= bound, name
    # Where gates are mild, that of a gate is a difference of sums of q·dq and k·dk: exactly nothing for the
    # first token, and float32 leaves a rounding error of the size of these terms.
    assert relative(gradients[3], want[3], np.abs(inputs[0] * want[0]).max()) <= bound


@given(tokens=st.integers(1, 150), chunk=st.sampled_from([1, 2, 16, 64]),
       low=st.sampled_from([-30, -5, -0.3, 0.0]), part=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_chunks_equal_the_recurrence(tokens, chunk, low, part, seed):
    """Gates between 1e-30 and 1, any number of tokens; float32 against float64."""
    compare(random_inputs(tokens, low, low * part, seed=seed), chunk, 1e-5)


@pytest.mark.parametrize('tokens', [4097, 16384])
@pytest.mark.parametrize('low, high', [(0, 0), (-1e-3, 0), (-0.1, 0), (-30, 0), (-30, -30)])
@pytest.mark.slow
def test_long_sequences_equal_the_recurrence(tokens, low, high):
    compare(random_inputs(tokens, low, high, heads=1), 0, 1e-5)


@pytest.mark.parametrize('part', [0.98, 1.02], ids=['the last that is mild', 'the first that is not'])
def test_both_forms_hold_where_one_gives_way_to_the_other(part):
    q, k, v, g, cotangent = random_inputs(96, -0.5, 0)
    sums = g.reshape(1, 6, 16, 2, 4).sum(2, keepdims=True)
    g = (g.reshape(1, 6, 16, 2, 4) * (part * gla_mild.MILD / -sums.min())).reshape(g.shape).astype(np.float32)
    compare((q, k, v, g, cotangent), 16, 1e-5)


def test_a_strong_gate_between_weak_ones_costs_no_precision():
    q, k, v, g, cotangent = random_inputs(64, -1e-3, 0)
    g[:, ::9] = np.log(1e-30)       # sums of logarithms over the chunk would have an error of 1e-5 each
    compare((q, k, v, g, cotangent), 64, 1e-6)


def test_the_gradient_of_the_last_state():
    *inputs, _ = random_inputs(37, -0.5, 0)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(a, jnp.float64) for a in inputs]
        want = jax.jit(jax.grad(lambda a: jnp.sin(recurrent_gla(*a)[1]).sum()))(inputs)
        got = jax.jit(jax.grad(lambda a: jnp.sin(chunked_gla(*a, chunk=8)[1]).sum()))(inputs)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize('name', ['dig_gla_normal', 'dig_gla_strong'])
def test_the_official_recurrence(name, goldens):
    _, _, arrays = weights.load(goldens / f'{name}.npz')
    q, k, v, g = (np.swapaxes(arrays[f'in_{n}'], 1, 2) for n in 'qkvg')
    scale = q.shape[-1] ** -0.5
    for form in (chunked_gla, recurrent_gla):
        o, state = jax.jit(form)(q, k, v, g)
        assert relative(scale * o.swapaxes(1, 2), arrays['out64_o']) <= 2e-5
        assert relative(state, arrays['out64_state']) <= 2e-5
    with jax.enable_x64(True):
        o, _ = jax.jit(chunked_gla)(*(np.float64(a) for a in (q, k, v, g)))
        assert relative(scale * o.swapaxes(1, 2), arrays['out64_o']) <= 1e-13


def test_bfloat16_keeps_states_in_float32():
    """4,096 equal terms: a bfloat16 state would stop growing at 256."""
    ones = jnp.ones((1, 4096, 1, 1), jnp.bfloat16)
    _, last = jax.jit(chunked_gla)(ones, ones, ones, jnp.zeros((1, 4096, 1, 1)))
    assert last.dtype == jnp.float32 and last[0, 0, 0, 0] == 4096


# ------------------------------------------------------------------------------------------------------
# The mixer


def mixer(dtype=jnp.float32, width=16, **options):
    return made(lambda: build_mixer({'name': 'gla', 'heads': 2, **options}, width, dtype=dtype,
                                    rngs=nnx.Rngs(0)))


def test_a_token_sees_only_what_comes_before_it():
    layer, x = mixer(), normal(0, (1, 12, 16))
    moved = applied(layer, x.at[:, 7].add(1), (3, 4)) - applied(layer, x, (3, 4))
    assert not moved[:, :7].any() and np.abs(moved[:, 7:]).min(-1).all()


@pytest.mark.parametrize('directions, sees', [('bidirectional', 2), ('four', 4)])
def test_several_directions_are_the_sum_of_single_ones(directions, sees):
    """Each direction is the causal layer on tokens put in another order: the last product is linear."""
    grid, x = (3, 4), normal(0, (2, 12, 16))
    rows = np.arange(12).reshape(grid)
    orders = [rows.ravel(), rows.ravel()[::-1], rows.T.ravel(), rows.T.ravel()[::-1]][:sees]
    layer, x = mixer(), np.asarray(x)
    want = sum(np.asarray(applied(layer, x[:, order], grid))[:, np.argsort(order)] for order in orders)
    np.testing.assert_allclose(applied(mixer(directions=directions), x, grid), want, rtol=1e-4, atol=1e-5)
    assert len(DIRECTIONS[directions]) == sees


def test_the_readings_of_the_paper():
    x = normal(0, (2, 12, 16))
    plain = applied(mixer(), x, (3, 4))
    paper = mixer(value_gate=True, norm='layer', gate_bias=True)
    assert paper.gate.has_bias and paper.norm_bias.shape == (8,)
    assert np.abs(applied(paper, x, (3, 4)) - plain).max() > 1e-4
    # Gates that never forget are those that are not there.
    gated, free = mixer(value_gate=True), mixer()
    gated.value_decay.kernel[...], gated.value_decay.bias[...] = 0 * gated.value_decay.kernel[
        ...], 1e3 + gated.value_decay.bias[...]
    for name in ('q', 'key', 'value', 'gate', 'decay_in', 'decay_out', 'proj'):
        getattr(free, name).kernel[...] = getattr(gated, name).kernel[...]
    np.testing.assert_allclose(applied(gated, x, (3, 4)), applied(free, x, (3, 4)), rtol=1e-4, atol=1e-6)


def test_initial_values():
    layer = mixer(width=256)
    shapes = {'q': (256, 2, 64), 'key': (256, 2, 64), 'value': (256, 2, 128), 'gate': (256, 2, 128),
              'decay_in': (256, 16), 'decay_out': (16, 2, 64), 'proj': (2, 128, 256)}
    for name, shape in shapes.items():
        kernel = getattr(layer, name).kernel[...]
        rows = 256 if name != 'decay_out' else 16
        bound = 2 ** -2.5 * np.sqrt(6 / (rows + kernel.size // rows))
        assert kernel.shape == shape and 0.95 * bound < np.abs(kernel).max() <= bound
        assert getattr(layer, name).has_bias == (name == 'decay_out')
    assert (layer.norm_gain[...] == 1).all()


def test_bfloat16_stays_near_float32():
    x = normal(0, (2, 100, 16))
    got, want = (applied(mixer(dtype), x.astype(dtype), (10, 10)) for dtype in (jnp.bfloat16, jnp.float32))
    assert got.dtype == jnp.bfloat16 and relative(got, np.asarray(want, np.float64)) <= 3e-2


@pytest.mark.parametrize('options, sizes', [
    ({}, (8, 1, 1, 1)), ({'directions': 'bidirectional', 'value_gate': True}, (2, 2, 2, 1)),
    pytest.param({'directions': 'four'}, (2, 2, 2, 1), marks=pytest.mark.slow)], ids=str)
def test_cut_over_devices_it_is_the_same(sizes, options):
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    graphdef, params = nnx.split(mixer(**options))
    x = normal(0, (8, 12, 16))

    def run(params, x):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, (3, 4)), params, x)
        return y, pull(jnp.sin(y))

    want = jax.jit(run)(params, x)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(params, NamedSharding(mesh, P())),
                           jax.device_put(x, NamedSharding(mesh, P(('data', 'fsdp')))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


ARCH = {'family': 'dit', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 12), 'channels': 4,
        'num_classes': 3, 'mixer': {'name': 'gla', 'heads': 2}}


def test_it_mixes_tokens_in_the_plain_backbone():
    network = Network(ARCH)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, jax.jit(network.init)(jax.random.key(0)))
    y = jax.jit(network.apply)(params, jnp.ones((2, 8, 12, 4)), jnp.array([1, 9]),
                               {'label': jnp.array([0, 3])})
    assert y.shape == (2, 8, 12, 8) and np.isfinite(y).all()


def test_rows_cannot_be_cut():
    with pytest.raises(UserError,
                       match=r'stretch of tokens that gla mixes as one are not divisible by mesh\.seq = 2'):
        check_partition(check_arch(ARCH), {'fsdp': 1, 'tensor': 1, 'seq': 2})


@pytest.mark.parametrize('options, says', [
    ({'expand_k': 0.3}, 'no whole number of key channels'),
    ({'directions': 'two'}, 'known: causal, bidirectional, four'),
    ({'norm': 'batch'}, 'known: rms, layer'), ({'chunk': 12}, 'power of two')])
def test_wrong_options_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        mixer(**options)


def test_tokens_must_fill_the_grid():
    with pytest.raises(UserError, match='12 tokens do not fill a grid of 3 x 5'):
        mixer()(jnp.zeros((1, 12, 16)), (3, 5))
