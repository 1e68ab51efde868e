"""Sana's attention and its Mix-FFN against diffusers' modules, and its blocks against diffusers' model."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, made, normal
from flax import nnx
from goldens import weights
from tiers import BOTH_WIDTHS

from lit_jax.models.ffn import FFNS
from lit_jax.models.layers import TimestepEmbedder, gate, modulate
from lit_jax.models.mixers import build_mixer
from lit_jax.models.mixers.linear import weighted_sum
from lit_jax.runtime.errors import UserError

DIFFUSERS_EPS = 1e-15


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def bound(wide):
    return 1e-12 if wide else 2e-5


def filled(build, params):
    """The module that `build` makes, with these parameters; its own are never drawn."""
    return nnx.merge(nnx.split(nnx.eval_shape(build))[0], jax.tree.map(jnp.asarray, params))


def attention(torch, prefix, width, heads, bias, dtype):
    """The mixer with the weights of a diffusers `Attention`."""
    head = (heads, width // heads)
    names = [f'{prefix}to_{name}' for name in 'qkv']
    params = {'qkv': {'kernel': np.stack([torch[f'{name}.weight'].T.reshape(width, *head) for name in names],
                                         1)},
              'proj': {'kernel': torch[f'{prefix}to_out.0.weight'].T.reshape(*head, width),
                       'bias': torch[f'{prefix}to_out.0.bias']}}
    if bias:
        params['qkv']['bias'] = np.stack([torch[f'{name}.bias'].reshape(head) for name in names])
    options = {'name': 'sana', 'heads': heads, 'qkv_bias': bias, 'eps': DIFFUSERS_EPS}
    return filled(lambda: build_mixer(options, width, dtype=dtype, rngs=nnx.Rngs(0)), params)


def mix_ffn(torch, prefix, width, ratio, dtype):
    """The Mix-FFN with the weights of a diffusers `GLUMBConv`."""
    hidden = FFNS['mix'].hidden_width(width, ratio)
    params = {'inverted': {'kernel':
                           torch[f'{prefix}conv_inverted.weight'][:, :, 0, 0].T.reshape(width, 2, hidden),
                           'bias': torch[f'{prefix}conv_inverted.bias'].reshape(2, hidden)},
              'depth': {'kernel': torch[f'{prefix}conv_depth.weight'].transpose(2, 3, 1, 0).reshape(
                  3, 3, 2, hidden),
                        'bias': torch[f'{prefix}conv_depth.bias'].reshape(2, hidden)},
              'point': {'kernel': torch[f'{prefix}conv_point.weight'][:, :, 0, 0].T}}
    return filled(lambda: FFNS['mix'](width, ratio, dtype=dtype, rngs=nnx.Rngs(0)), params)


def tokens_of(image_BCHW):
    b, c = image_BCHW.shape[:2]
    return np.moveaxis(image_BCHW, 1, -1).reshape(b, -1, c)


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['sana_attn', 'sana_attn_onehead'])
def test_attention_is_the_official_one(name, wide, goldens):
    meta, torch, arrays = weights.load(goldens / f'{name}.npz')
    case = meta['config']
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        mixer = attention(torch, '', case['dim'], case['heads'], case['bias'], dtype)
        got = jax.jit(lambda x: mixer(x, (1, x.shape[1])))(np.asarray(arrays['in_x'], dtype))
        assert got.dtype == dtype
        assert relative(got, arrays['out64_y']) <= bound(wide)


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['sana_ffn', 'sana_ffn4'])
def test_mix_ffn_is_the_official_one(name, wide, goldens):
    meta, torch, arrays = weights.load(goldens / f'{name}.npz')
    case = meta['config']
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        ffn = mix_ffn(torch, '', case['dim'], case['ratio'], dtype)
        got = jax.jit(lambda x: ffn(x, tuple(case['hw'])))(jnp.asarray(tokens_of(arrays['in_x']), dtype))
        assert got.dtype == dtype
        assert relative(got, tokens_of(arrays['out64_y'])) <= bound(wide)


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['sana_model', 'sana_model_pe'])
def test_blocks_are_the_official_ones_but_for_the_text(name, wide, goldens):
    """Every block of the text-to-image model: what its cross-attention adds is taken from the file."""
    meta, torch, arrays = weights.load(goldens / f'{name}.npz')
    case = meta['config']
    width, patch = case['heads'] * case['head_dim'], case['patch']
    grid = tuple(side // patch for side in case['hw'])
    names = {f'fc{i}': f'time_embed.emb.timestep_embedder.linear_{i}' for i in (1, 2)}
    embedder = {ours: {'kernel': torch[f'{name}.weight'].T, 'bias': torch[f'{name}.bias']}
                for ours, name in names.items()}

    def run(x, t, cross):
        embed = filled(lambda: TimestepEmbedder(width, dtype=x.dtype, rngs=nnx.Rngs(0)), embedder)
        t0_B6D = jax.nn.silu(embed(t)) @ torch['time_embed.linear.weight'].T + torch['time_embed.linear.bias']
        for i, add in enumerate(cross):
            prefix = f'transformer_blocks.{i}.'
            table = (t0_B6D.reshape(-1, 6, width) + torch[f'{prefix}scale_shift_table']).astype(x.dtype)
            mixer = attention(torch, f'{prefix}attn1.', width, case['heads'], case['bias'], x.dtype)
            attended = mixer(modulate(x, table[:, 0], table[:, 1]), grid)
            x = x + gate(attended, table[:, 2]) + add
            fed = mix_ffn(torch, f'{prefix}ff.', width, case['ratio'],
                          x.dtype)(modulate(x, table[:, 3], table[:, 4]), grid)
            x = x + gate(fed, table[:, 5])
            yield from ((f'block{i}_attn_out', attended), (f'block{i}_ff_out', fed), (f'block{i}_out', x))

    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        cross = [np.asarray(arrays[f'mid_block{i}_cross_out'], dtype) for i in range(case['layers'])]
        got = jax.jit(lambda *args: dict(run(*args)))(*(np.asarray(arrays[k], dtype)
                                                        for k in ('mid_tokens', 'in_t')), cross)
    for name, value in got.items():
        want = arrays[f'mid_{name}']
        # In float32 the sine of angles up to 999 alone has 6e-5: a step more than of the modules themselves.
        assert relative(value, tokens_of(want) if want.ndim == 4 else want) <= (1e-12 if wide else 6e-5), name


def test_it_is_its_own_quadratic_form(x64):
    mixer = made(lambda: build_mixer({'name': 'sana', 'heads': 2}, 8, dtype=jnp.float64, rngs=nnx.Rngs(0)))

    def quadratic(x):
        q, k, v = (mixer.qkv(x)[:, :, i] for i in range(3))
        weights_BKNM = jnp.einsum('bnke,bmke->bknm', jax.nn.relu(q), jax.nn.relu(k))
        weights_BKNM = weights_BKNM / (weights_BKNM.sum(-1, keepdims=True) + 1e-8)
        return mixer.proj(jnp.einsum('bknm,bmke->bnke', weights_BKNM, v))

    x = normal(0, (2, 12, 8), jnp.float64)
    np.testing.assert_allclose(applied(mixer, x, (3, 4)), jax.jit(quadratic)(x), atol=1e-12)


@pytest.mark.parametrize('tokens', [5, 40])
def test_the_shortest_way_gives_the_same(tokens, x64):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, tokens, 16))
    compiled = jax.jit(weighted_sum, static_argnames='shortest')
    np.testing.assert_allclose(compiled(q, k, v, shortest=True), compiled(q, k, v), atol=1e-13)


@pytest.mark.parametrize('eps', [1e-8, DIFFUSERS_EPS])
def test_queries_without_features_give_zero_and_finite_gradients(eps):
    mixer = made(lambda: build_mixer({'name': 'sana', 'heads': 1, 'eps': eps}, 8, dtype=jnp.float32,
                                     rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(mixer)
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(params))
    # with positive tokens no query is positive
    params['qkv']['kernel'] = params['qkv']['kernel'].at[:, 0].set(-1.0)
    x = jnp.abs(normal(0, (1, 16, 8))) + 0.1

    def apply(params, x):
        return nnx.merge(graphdef, params)(x, (4, 4))

    def both(params, x):
        y, pull = jax.vjp(apply, params, x)
        return y, pull(jnp.ones_like(y))

    y, gradients = jax.jit(both)(params, x)
    assert (y == 0).all()               # the bias of proj starts at zero
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_an_epsilon_of_zero_is_refused():
    with pytest.raises(UserError, match='mixer.eps must be positive, got 0'):
        build_mixer({'name': 'sana', 'heads': 1, 'eps': 0}, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
