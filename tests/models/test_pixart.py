"""PixArt-Σ against the official code: masks, unlike sizes, interpolated positions, compressed keys; and LiT
in its place."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, made, normal, random_tree
from flax import nnx
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import quick

from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.guidance import guide
from lit_jax.models.network import Model, Network, count_parameters
from lit_jax.models.pixart import CaptionEmbedder, masked_attention, position_coordinates
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh, state_shardings

MODELS = ['pixart_square', 'pixart_nonsquare_kv', 'pixart_wide_nomask']
TINY = {'family': 'pixart', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 3,
        'cross_heads': 2,
        'caption_channels': 12, 'caption_tokens': 5, 'base_size': 4,
        'mixer': {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 5}}


def golden_arch(config):
    """The architecture of a golden file."""
    stages = ()
    if config['kv']:
        first = min(config['kv'])
        stages = ({'depth': first}, {'depth': config['depth'] - first, 'mixer': {'compress': 2}})
    side = config['input_size']
    return {'family': 'pixart', 'depth': config['depth'], 'width': config['width'], 'patch': config['patch'],
            'input_size': (side, side), 'channels': 4, 'mixer': {'name': 'softmax', 'heads': config['heads']},
            'stages': stages, 'cross_heads': config['heads'], 'caption_channels': config['cap'],
            'caption_tokens': config['L'], 'base_size': side // config['patch'],
            'pe_interpolation': config['pe_interpolation']}


def load_golden(path, dtype, **options):
    """(network, params, arrays in NHWC) of a golden file."""
    meta, state, arrays = weights.load(path)
    arch, params = from_torch_state(state, golden_arch(meta['config']))
    arrays = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 and 'y' not in k.split('_') else v
              for k, v in arrays.items()}
    return Network(arch, dtype=dtype,
                   **options), jax.tree.map(lambda p: np.asarray(p, dtype), params), arrays


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def outputs(network, params, arrays):
    """Forward, guided forward with three channels, and the noise of the solver's branch, by their golden
    names."""
    dtype = network.dtype

    apply = jax.jit(network.apply)

    def model_fn(x, t, cond):
        return apply(params, x, t, cond)

    def cond(name):
        text = {'text': np.asarray(arrays[name][:, 0], dtype)}
        return text | ({'text_mask': arrays['in_mask']} if 'in_mask' in arrays else {})

    yield 'eps_v', model_fn(np.asarray(arrays['in_x'], dtype), np.asarray(arrays['in_t'], dtype),
                            cond('in_y'))
    rows = len(arrays['in_cfg_x'])
    both = cond('in_cfg_y')
    if 'text_mask' in both:       # the official code takes the first caption's mask for all rows
        both['text_mask'] = np.repeat(arrays['in_mask'][:1], rows, axis=0)
    x, t = np.asarray(arrays['in_cfg_x'], dtype), np.asarray(arrays['in_cfg_t'], dtype)
    yield 'dpm_branch_eps', model_fn(x, t, both)[..., :x.shape[-1]]
    half = rows // 2
    given, null = ({name: value[part] for name, value in both.items()}
                   for part in (slice(half), slice(half, rows)))
    yield 'cfg_4.5_3ch', guide(model_fn, 4.5, lambda cond: (cond, null))(x[:half], t[:half], given)


@pytest.mark.parametrize('name, scan_layers', quick(itertools.product(MODELS, (True, False)), [
    ('pixart_square', True), ('pixart_nonsquare_kv', False)]))
def test_float32_equals_the_official_model(name, scan_layers, goldens):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float32, scan_layers=scan_layers)
    for key, got in outputs(network, params, arrays):
        assert relative_error(got, arrays[f'out64_{key}'][:len(got)]) <= 2e-5, key


@pytest.mark.parametrize('name', MODELS)
def test_float64_equals_the_official_model(name, goldens, x64):
    """1e-6: the official coordinates are float32 also there."""
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float64)
    for key, got in outputs(network, params, arrays):
        assert got.dtype == jnp.float64
        assert relative_error(got, arrays[f'out64_{key}'][:len(got)]) <= 1e-6, key


def test_the_null_caption_is_the_official_one(goldens):
    meta, state, arrays = weights.load(goldens / 'pixart_square.npz')
    _, params, _ = load_golden(goldens / 'pixart_square.npz', jnp.float32)
    assert 'null_caption' not in params['y_embedder']
    replaced = arrays['in_y'][:, 0].copy()
    replaced[0] = state['y_embedder.y_embedding']
    assert relative_error(embedded(params, replaced), arrays['out64_y_dropped'][:, 0]) <= 2e-5


def embedded(params, text):
    """The caption embedding, written out."""
    fc1, fc2 = params['y_embedder']['fc1'], params['y_embedder']['fc2']
    return jax.nn.gelu(text @ fc1['kernel'] + fc1['bias'], approximate=True) @ fc2['kernel'] + fc2['bias']


def random_params(network, seed=0):
    return random_tree(network.abstract(), seed, 0.2)


def captions(rows, seed=0, length=5):
    rng = np.random.default_rng(seed)
    return {'text': rng.normal(size=(rows, length, 12)).astype(np.float32),
            'text_mask': np.tile([1, 1, 1, 0, 0][:length], (rows, 1))}


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), length=st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_any_size_and_any_number_of_tokens(rows, columns, length):
    network = Network(TINY)
    x = jnp.ones((2, 2 * rows, 2 * columns, 3))
    out = jax.eval_shape(network.apply, network.abstract(), x, jnp.zeros(2), captions(2, length=length))
    assert out.shape == (2, 2 * rows, 2 * columns, 6)


def test_padding_is_not_seen():
    network = Network(TINY)
    params, x, cond, apply = random_params(network), jnp.ones((2, 8, 8, 3)), captions(2), jax.jit(
        network.apply)
    other = {**cond, 'text': np.where(cond['text_mask'][..., None] > 0, cond['text'],
                                      99.0).astype(np.float32)}
    shorter = {name: value[:, :3] for name, value in cond.items()}
    want = apply(params, x, jnp.array([3.0, 900.5]), cond)
    np.testing.assert_array_equal(apply(params, x, jnp.array([3.0, 900.5]), other), want)
    np.testing.assert_allclose(apply(params, x, jnp.array([3.0, 900.5]), shorter), want, atol=1e-5)


def test_a_caption_without_tokens_is_finite():
    q, k = jnp.ones((1, 4, 2, 3)), jnp.arange(30.0).reshape(1, 5, 2, 3)
    out = masked_attention(q, k, k, jnp.zeros((1, 5), jnp.int32))
    np.testing.assert_allclose(out, jnp.broadcast_to(k.mean(1, keepdims=True), out.shape), rtol=1e-6)


def test_a_fresh_model_predicts_nothing_and_does_not_look_at_the_caption():
    network = Network(TINY)
    params = jax.jit(network.init)(jax.random.key(0))
    assert (params['blocks']['cross_attn']['proj']['kernel'] == 0).all()
    assert (jax.jit(network.apply)(params, jnp.ones((2, 8, 8, 3)), jnp.zeros(2), captions(2)) == 0).all()


def test_captions_arrive_in_a_small_model_as_large_as_in_the_published_one():
    """0.02 at the published sizes; with as small weights a model of 64 and 128 channels ignores its captions
    for 10,000 steps."""
    sizes = {}
    for channels, width in ((4096, 1152), (64, 128)):
        embedder = made(lambda channels=channels, width=width: CaptionEmbedder(
            channels, width, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        text_BLC = np.random.default_rng(0).normal(size=(2, 3, channels)).astype(np.float32)
        sizes[width] = float(np.std(applied(embedder, text_BLC)))
        if width == 1152:
            assert float(embedder.fc1.kernel[...].std()) == pytest.approx(0.02, rel=0.01)
            assert float(embedder.fc2.kernel[...].std()) == pytest.approx(0.02, rel=0.01)
    assert sizes[128] == pytest.approx(sizes[1152], rel=0.1)


@pytest.mark.parametrize('pixels', [256, 512, 1024, 2048])
def test_every_resolution_sees_the_same_coordinates(pixels):
    """PixArt-Σ: 0 to 32 at the size that it was trained at, whatever that is; a wider image than that as
    well."""
    side = pixels // 16
    for tokens in (side, side // 2 * 3):
        coordinates = position_coordinates(tokens, side, pixels / 512)
        assert coordinates[0] == 0 and coordinates[-1] == pytest.approx(32 * (1 - 1 / tokens))


@pytest.mark.parametrize('mixer, published', [({'name': 'softmax', 'heads': 16}, 610_856_096),
                                              ({'name': 'linear', 'heads': 2}, 611_178_656)])
def test_parameters_are_those_of_the_papers(mixer, published):
    network = Network({'family': 'pixart', 'depth': 28, 'width': 1152, 'patch': 2, 'input_size': (64, 64),
                       'channels': 4, 'cross_heads': 16, 'caption_channels': 4096, 'caption_tokens': 300,
                       'mixer': mixer})
    assert count_parameters(network) == published


def test_bfloat16_stays_near_float32():
    params, x, cond = random_params(Network(TINY)), jnp.ones((2, 8, 8, 3)), captions(2)
    wide, narrow = (jax.jit(Network(TINY, dtype=dtype).apply)(params, x, jnp.array([3, 900]), cond)
                    for dtype in (jnp.float32, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16 and relative_error(narrow, np.asarray(wide, np.float64)) <= 0.05


def test_guidance_takes_the_null_caption_or_the_negative_prompt():
    network, cond = Network(TINY), captions(2)
    empty = np.full((5, 12), 0.5, np.float32)
    given, null = network.guidance_pair({**cond, 'null_text': empty})
    assert set(given) == set(null) == set(cond) and (null['text'] == empty).all()
    assert null['text'].shape == cond['text'].shape and (null['text_mask'] == cond['text_mask']).all()
    given, null = network.guidance_pair({**cond, 'null_text': 0 * cond['text'],
                                         'null_text_mask': 1 - cond['text_mask']})
    assert (null['text'] == 0).all() and (null['text_mask'] == 1
                                          - cond['text_mask']).all() and set(given) == set(null)
    with pytest.raises(UserError, match='null_text'):
        network.guidance_pair(cond)


@pytest.mark.parametrize('change, words', [
    ({'cross_heads': 5}, 'cross_heads 5 does not divide'),
    ({'caption_channels': 0}, 'caption_channels must be a whole number'),
    ({'pe_interpolation': -1}, 'pe_interpolation must be'),
    ({'num_classes': 3}, 'unknown fields num_classes')])
def test_an_architecture_that_cannot_be_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        Network({**TINY, **change})


def test_wrong_inputs_are_named():
    network = Network(TINY)
    model = Model(network, random_params(network), {})
    x = np.ones((2, 8, 12, 3), np.float32)
    assert model(x, 5, captions(2)).shape == (2, 8, 12, 6)
    with pytest.raises(UserError, match='this model takes'):
        model(np.ones((2, 7, 8, 3)), 5, captions(2))
    with pytest.raises(UserError, match='an encoder of width 12'):
        model(x, 5, {'text': np.ones((2, 5, 16), np.float32)})
    with pytest.raises(UserError, match='features of captions'):
        model(x, 5, 3)
    with pytest.raises(UserError, match='draws from captions'):
        _ = network.null_label


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (2, 2, 2, 1), (2, 1, 1, 4)])
def test_cut_over_devices_it_is_the_same(sizes):
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    network = Network({**TINY, 'width': 32})
    params, t, cond = random_params(network), jnp.arange(8.0), captions(8)
    x = normal(1, (8, 8, 8, 3))
    want = jax.jit(network.apply)(params, x, t, cond)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(network.abstract(), mesh, network.arch))
        got = jax.jit(network.apply)(placed,
                                     *jax.device_put((x, t, cond), NamedSharding(mesh, P(('data', 'fsdp')))))
    assert relative_error(got, np.asarray(want, np.float64)) <= 1e-5
