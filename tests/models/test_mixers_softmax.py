"""Softmax attention against the official DiT, the textbook formula, and itself in other forms."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, graph, made, normal, pulled
from flax import nnx
from goldens import weights
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import BOTH_WIDTHS

from lit_jax.models.arch import check_arch, check_partition
from lit_jax.models.mixers import build_mixer
from lit_jax.models.mixers.softmax import dot_product_attention
from lit_jax.plan.collectives import find_collectives, format_collectives
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh


def textbook(q, k, v):
    """The whole map in the widest dtype at hand, [B, N, K, E]."""
    logits = jnp.einsum('bqke,bnke->bkqn', q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum('bkqn,bnke->bqke', jax.nn.softmax(logits, axis=-1), v)


def random_qkv(shape, dtype=np.float64, seed=0):
    return [jnp.asarray(a.astype(dtype)) for a in np.random.default_rng(seed).normal(size=(3, *shape))]


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['dit_a', 'dit_p4'])
def test_attention_of_the_official_dit(name, wide, goldens):
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    heads = meta['config']['heads']
    width = meta['config']['width']
    head = (heads, width // heads)
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        graphdef = graph(lambda: build_mixer({'name': 'softmax', 'heads': heads}, width, dtype=dtype,
                                             rngs=nnx.Rngs(0)))
        apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, (1, x.shape[1])))
        for block in range(meta['config']['depth']):
            torch = {k.removeprefix(f'blocks.{block}.attn.'): v for k, v in state.items()
                     if f'blocks.{block}.attn.' in k}
            params = {'qkv': {'kernel': torch['qkv.weight'].T.reshape(width, 3, *head),
                              'bias': torch['qkv.bias'].reshape(3, *head)},
                      'proj': {'kernel': torch['proj.weight'].T.reshape(*head, width),
                               'bias': torch['proj.bias']}}
            x = np.asarray(arrays[f'mid_block{block}_attn_in'], dtype)
            got = apply(params, x)
            # The inputs are a float64 run's; float32 sees them rounded, which costs a few times its epsilon.
            assert relative(got, arrays[f'mid_block{block}_attn_out']) <= (1e-9 if wide else 2e-5)


def assert_textbook(q, k, v):
    """Values and gradients in float64: only the order of sums differs."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
                 pulled(dot_product_attention, q, k, v), pulled(textbook, q, k, v))


@pytest.mark.parametrize('shape', [(2, 6, 3, 4), (2, 300, 2, 8), (1, 513, 1, 4)], ids=str)
def test_values_and_gradients_are_the_textbook_ones(shape, x64):
    q, k, v = random_qkv(shape)
    assert_textbook(q, k, v)


def test_long_sequences_do_not_hold_the_map_on_cpu():
    tokens, heads = 2048, 4
    qkv = [jax.ShapeDtypeStruct((1, tokens, heads, 8), jnp.float32)] * 3
    both = jax.jit(jax.grad(lambda q, k, v: dot_product_attention(q, k, v).sum(), (0, 1, 2)))
    memory = both.lower(*qkv).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.5 * heads * tokens ** 2 * 4


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv((1, 8, 2, 4), np.float32)
    out = jax.jit(dot_product_attention)(1e3 * q, 1e3 * k, v)
    assert np.isfinite(out).all()
    # logits of 1e6, eps 6e-8
    assert relative(out, np.asarray(textbook(1e3 * q, 1e3 * k, v), np.float64)) < 1e-3


def test_bfloat16_sums_in_float32():
    # 4096 equal weights of 1/4096: a bfloat16 running sum would stop growing at 256.
    v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = jax.jit(dot_product_attention)(jnp.zeros_like(v), jnp.zeros_like(v), v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


def test_bfloat16_is_close_to_float64(x64):
    q, k, v = random_qkv((2, 300, 2, 16), jnp.bfloat16)
    want = textbook(*(a.astype(jnp.float64) for a in (q, k, v)))
    # the map is rounded to 8 bits before its product
    assert relative(jax.jit(dot_product_attention)(q, k, v), want) < 1e-2


def test_works_under_vmap_and_jit():
    q, k, v = random_qkv((3, 2, 260, 2, 4), np.float32)
    got = jax.jit(jax.vmap(dot_product_attention))(q, k, v)
    for i in range(3):
        np.testing.assert_allclose(got[i], dot_product_attention(q[i], k[i], v[i]), atol=1e-5)


def test_without_bias_there_is_none():
    build = functools.partial(build_mixer, width=8, dtype=jnp.float32)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(
        lambda: build({'name': 'softmax', 'heads': 2, 'qkv_bias': False}, rngs=nnx.Rngs(0)))))
    assert set(params['qkv']) == {'kernel'} and params['qkv']['kernel'].shape == (8, 3, 2, 4)
    assert params['proj']['kernel'].shape == (2, 4, 8) and params['proj']['bias'].shape == (8,)


# ------------------------------------------------------------------------------------------------------
# Compressed keys and values


def compressed_params(torch, head, rate):
    """Our leaves of PixArt-Σ's attention."""
    return {'qkv': {'kernel': torch['qkv.weight'].T.reshape(-1, 3, *head),
                    'bias': torch['qkv.bias'].reshape(3, *head)},
            'proj': {'kernel': torch['proj.weight'].T.reshape(*head, -1), 'bias': torch['proj.bias']},
            'compressor': {'kernel': torch['sr.weight'].transpose(2, 3, 1, 0).reshape(rate, rate, *head),
                           **{ours: torch[theirs].reshape(head) for ours, theirs in
                              (('bias', 'sr.bias'), ('norm_gain', 'norm.weight'),
                               ('norm_bias', 'norm.bias'))}}}


@BOTH_WIDTHS
def test_compressed_attention_is_the_one_of_pixart_sigma(wide, goldens):
    """Its sr weights are so small that the norm's epsilon shows; the grid is 6 x 4."""
    meta, state, arrays = weights.load(goldens / 'pixart_nonsquare_kv.npz')
    case = meta['config']
    head, grid = (case['heads'],
                  case['width'] // case['heads']), tuple(side // case['patch'] for side in case['hw'])
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        graphdef = graph(lambda: build_mixer({'name': 'softmax', 'heads': case['heads'], 'compress': 2},
                                             case['width'], dtype=dtype, rngs=nnx.Rngs(0)))
        apply = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, grid))
        for block in case['kv']:
            prefix = f'blocks.{block}.attn.'
            torch = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            got = apply(compressed_params(torch, head, 2),
                        np.asarray(arrays[f'mid_block{block}_attn_in'], dtype))
            assert relative(got, arrays[f'mid_block{block}_attn_out']) <= (1e-9 if wide else 2e-5)


def test_at_the_start_four_by_four_tokens_become_their_normed_mean(x64):
    mixer = made(lambda: build_mixer({'name': 'softmax', 'heads': 2, 'compress': 4}, 8, dtype=jnp.float64,
                                     rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 2, 4))
    got = applied(mixer.compressor, jnp.asarray(x.reshape(2, 96, 2, 4)), (8, 12))
    means = np.stack([x[:, 4 * r:4 * r + 4, 4 * c:4 * c + 4].mean((1, 2)) for r in range(2)
                      for c in range(3)], axis=1)
    centred = means - means.mean((-2, -1), keepdims=True)
    np.testing.assert_allclose(got, centred / np.sqrt((centred ** 2).mean((-2, -1), keepdims=True) + 1e-5),
                               atol=1e-12)


@pytest.mark.parametrize('queries, keys', [(6, 3), (300, 75), (576, 36)])
def test_fewer_keys_than_queries(queries, keys, x64):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 4))) for n in (queries, keys, keys))
    assert_textbook(q, k, v)


@pytest.mark.parametrize('sizes', [(2, 1, 1, 4), (1, 2, 2, 2)], ids=str)
def test_compressed_keys_on_a_mesh_change_nothing(sizes):
    """Values and gradients; the gradient of the compressor too, whose norm is over all heads."""
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    graphdef, params = nnx.split(made(
        lambda: build_mixer({'name': 'softmax', 'heads': 2, 'compress': 2}, 16, dtype=jnp.float32,
                            rngs=nnx.Rngs(0))))
    x = normal(0, (4, 16 * 12, 16))

    def run(params, x):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, (16, 12)), params, x)
        return y, pull(jnp.sin(y))

    want = jax.jit(run)(params, x)
    cut = NamedSharding(mesh, P(('data', 'fsdp'), 'seq', None))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(params, jax.device_put(x, cut))
        forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, (16, 12)), out_shardings=cut)
        found = find_collectives(forward.lower(params, jax.device_put(x, cut)).compile().as_text(), mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))
    # Only compressed keys and values are gathered: a quarter of the tokens each.
    gathered = sum(c.total_bytes for c in found if c.kind == 'all-gather' and c.axes == ('seq',))
    assert 0 < gathered <= 2 * x.nbytes / 4 / (sizes[0] * sizes[1] * sizes[2]), format_collectives(found)


def test_a_grid_that_does_not_divide_is_explained():
    mixer = build_mixer({'name': 'softmax', 'heads': 2, 'compress': 4}, 8, dtype=jnp.float32,
                        rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match='compress 4 does not divide the grid of 6 x 4 tokens'):
        mixer(jnp.zeros((1, 24, 8)), (6, 4))


def test_a_mesh_cuts_whole_runs_of_compressed_rows():
    arch = {'family': 'dit', 'depth': 4, 'width': 16, 'patch': 2, 'input_size': (32, 32), 'channels': 4,
            'num_classes': 3, 'mixer': {'name': 'softmax', 'heads': 2},
            'stages': ({'depth': 2}, {'depth': 2, 'mixer': {'compress': 4}})}
    sizes = {'data': 1, 'fsdp': 1, 'tensor': 1}
    check_partition(check_arch(arch), {**sizes, 'seq': 4})
    with pytest.raises(UserError, match='its 4 runs of 4 rows of tokens are not divisible by mesh.seq = 8'):
        check_partition(check_arch(arch), {**sizes, 'seq': 8})


@pytest.mark.parametrize('mixer, says', [
    ({'name': 'sofmax', 'heads': 2}, 'known: softmax, linear, '),
    ({'heads': 2}, 'unknown mixer None'),
    ({'name': 'softmax'}, 'needs heads'),
    ({'name': 'softmax', 'heads': 5}, 'possible: 1, 2, 4, 8'),
    ({'name': 'softmax', 'heads': 0}, '0 heads do not divide'),
    ({'name': 'softmax', 'heads': True}, 'True heads'),
    ({'name': 'softmax', 'heads': 2, 'dwc_kernel': 5},
     "no option 'dwc_kernel'; its options: heads, qkv_bias, compress"),
    ({'name': 'softmax', 'heads': 2, 'compress': 0}, 'compress must be a positive integer'),
])
def test_wrong_recipes_are_explained(mixer, says):
    with pytest.raises(UserError, match=says):
        build_mixer(mixer, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
