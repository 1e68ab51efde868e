"""Softmax attention against the official DiT, the textbook formula, and itself in other forms."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import weights

from lit_jax.errors import UserError
from lit_jax.models.mixers import build_mixer
from lit_jax.models.mixers.softmax import dot_product_attention


def textbook(q, k, v):
    """The whole map in the widest dtype at hand, [B, N, K, E]."""
    logits = jnp.einsum('bqke,bnke->bkqn', q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum('bkqn,bnke->bqke', jax.nn.softmax(logits, axis=-1), v)


def random_qkv(shape, dtype=np.float64, seed=0):
    return [jnp.asarray(a, dtype) for a in np.random.default_rng(seed).normal(size=(3, *shape))]


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize('wide', [False, True], ids=['float32', 'float64'])
@pytest.mark.parametrize('name', ['dit_a', 'dit_p4'])
def test_attention_of_the_official_dit(name, wide, goldens):
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    heads = meta['config']['heads']
    width = meta['config']['width']
    head = (heads, width // heads)
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        mixer = build_mixer({'name': 'softmax', 'heads': heads}, width, dtype=dtype, rngs=nnx.Rngs(0))
        graphdef, _ = nnx.split(mixer)
        apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, (1, x.shape[1])))
        for block in range(meta['config']['depth']):
            torch = {k.removeprefix(f'blocks.{block}.attn.'): v for k, v in state.items() if f'blocks.{block}.attn.' in k}
            params = {'qkv': {'kernel': torch['qkv.weight'].T.reshape(width, 3, *head),
                              'bias': torch['qkv.bias'].reshape(3, *head)},
                      'proj': {'kernel': torch['proj.weight'].T.reshape(*head, width), 'bias': torch['proj.bias']}}
            x = jnp.asarray(arrays[f'mid_block{block}_attn_in'], dtype)
            got = apply(params, x)
            # The inputs are a float64 run's; float32 sees them rounded, which costs a few times its epsilon.
            assert relative(got, arrays[f'mid_block{block}_attn_out']) <= (1e-9 if wide else 2e-5)


@pytest.mark.parametrize('shape', [(2, 6, 3, 4), (2, 300, 2, 8), (1, 513, 1, 4)], ids=str)
def test_values_and_gradients_are_the_textbook_ones(shape, x64):
    q, k, v = random_qkv(shape)
    got, gradients = jax.vjp(dot_product_attention, q, k, v)
    want, expected = jax.vjp(textbook, q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-12)       # float64: only the order of sums differs
    for a, b in zip(gradients(jnp.sin(q)), expected(jnp.sin(q)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_long_sequences_do_not_hold_the_map_on_cpu():
    tokens, heads = 2048, 4
    qkv = [jax.ShapeDtypeStruct((1, tokens, heads, 8), jnp.float32)] * 3
    both = jax.jit(jax.grad(lambda q, k, v: dot_product_attention(q, k, v).sum(), (0, 1, 2)))
    memory = both.lower(*qkv).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.5 * heads * tokens ** 2 * 4


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv((1, 8, 2, 4), np.float32)
    out = dot_product_attention(1e3 * q, 1e3 * k, v)
    assert np.isfinite(out).all()
    assert relative(out, np.asarray(textbook(1e3 * q, 1e3 * k, v), np.float64)) < 1e-3     # logits of 1e6, eps 6e-8


def test_bfloat16_sums_in_float32():
    # 4096 equal weights of 1/4096: a bfloat16 running sum would stop growing at 256.
    v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = dot_product_attention(jnp.zeros_like(v), jnp.zeros_like(v), v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


def test_bfloat16_is_close_to_float64(x64):
    q, k, v = random_qkv((2, 300, 2, 16), jnp.bfloat16)
    want = textbook(*(a.astype(jnp.float64) for a in (q, k, v)))
    assert relative(dot_product_attention(q, k, v), want) < 1e-2      # the map is rounded to 8 bits before its product


def test_works_under_vmap_and_jit():
    q, k, v = random_qkv((3, 2, 260, 2, 4), np.float32)
    got = jax.jit(jax.vmap(dot_product_attention))(q, k, v)
    for i in range(3):
        np.testing.assert_allclose(got[i], dot_product_attention(q[i], k[i], v[i]), atol=1e-5)


def test_without_bias_there_is_none():
    build = functools.partial(build_mixer, width=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(build({'name': 'softmax', 'heads': 2, 'qkv_bias': False})))
    assert set(params['qkv']) == {'kernel'} and params['qkv']['kernel'].shape == (8, 3, 2, 4)
    assert params['proj']['kernel'].shape == (2, 4, 8) and params['proj']['bias'].shape == (8,)


@pytest.mark.parametrize('mixer, says', [
    ({'name': 'sofmax', 'heads': 2}, 'known: softmax, linear'),
    ({'heads': 2}, 'unknown mixer None'),
    ({'name': 'softmax'}, 'needs heads'),
    ({'name': 'softmax', 'heads': 5}, 'possible: 1, 2, 4, 8'),
    ({'name': 'softmax', 'heads': 0}, '0 heads do not divide'),
    ({'name': 'softmax', 'heads': True}, 'True heads'),
    ({'name': 'softmax', 'heads': 2, 'dwc_kernel': 5}, "no option 'dwc_kernel'; its options: heads, qkv_bias"),
])
def test_wrong_recipes_are_explained(mixer, says):
    with pytest.raises(UserError, match=says):
        build_mixer(mixer, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
