"""The autoencoder against diffusers' AutoencoderKL (golden files), and decoding in pieces against decoding
whole."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import quick

from lit_jax.convert.torch_files import source_from_arrays
from lit_jax.convert.vae_torch import read_vae_params
from lit_jax.models.convolution import GroupNorm
from lit_jax.models.vae import (
    UpsampleConv,
    VaeNetwork,
    check_vae_arch,
    cover,
    decode_tiles,
    sample_posterior,
)
from lit_jax.runtime.errors import UserError

GOLDEN = ['vae_four', 'vae_groups32', 'vae_two']
TINY = {'widths': (8, 16), 'layers': 1, 'groups': 4, 'channels': 2}


def load_golden(path, dtype):
    """(network, params, arrays in NHWC) of a golden file."""
    meta, state, arrays = weights.load(path)
    config = meta['config']
    network = VaeNetwork({'widths': config['widths'], 'layers': config['layers'], 'groups': config['groups'],
                          'channels': config['latent']}, dtype=dtype)
    params = read_vae_params(source_from_arrays(state), network.arch, path.name)
    to_ours = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return (network, jax.tree.map(lambda p: np.asarray(p, to_ours), params),
            {k: np.moveaxis(v, 1, -1).astype(to_ours if k.startswith('in_') else v.dtype)
             for k, v in arrays.items()})


def outputs(network, params, arrays):
    def run(params, image, latent):
        mean, logvar = network.encode(params, image)
        return {'mean': mean, 'logvar': logvar, 'image': network.decode(params, latent)}

    return jax.jit(run)(params, arrays['in_image'], arrays['in_latent'])


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.fixture(scope='module')
def tiny():
    """Weights of order 1/sqrt(fan-in), from numpy: many small random draws take jax long to compile."""
    network, rng = VaeNetwork(TINY), np.random.default_rng(0)
    return network, jax.tree.map(
        lambda leaf: rng.normal(1 if leaf.ndim == 1 else 0, 0.6 * max(np.prod(leaf.shape[:-1]), 9) ** -0.5,
                                leaf.shape).astype(np.float32), network.abstract())


# ------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize('name', quick(GOLDEN, ['vae_two']))
def test_float32_equals_the_official_model(name, goldens):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float32)
    for key, got in outputs(network, params, arrays).items():
        assert got.dtype == jnp.float32
        assert relative_error(got, arrays[f'out64_{key}']) <= 2e-5, key


@pytest.mark.parametrize('name', GOLDEN)
def test_float64_equals_the_official_model(name, goldens, x64):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float64)
    for key, got in outputs(network, params, arrays).items():
        assert got.dtype == jnp.float64
        assert relative_error(got, arrays[f'out64_{key}']) <= 1e-12, key


def test_bfloat16_stays_near_float32(goldens):
    """Bound: some forty layers with 8 bits of mantissa, on outputs of order one; about 2e-2 is seen."""
    network, params, arrays = load_golden(goldens / 'vae_four.npz', jnp.bfloat16)
    for key, got in outputs(network, params, arrays).items():
        assert got.dtype == jnp.float32
        assert relative_error(got, arrays[f'out64_{key}']) <= 6e-2, key


def test_full_configuration_has_the_published_size():
    network = VaeNetwork({})
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract())) == 83_653_863
    assert network.downscale == 8 and network.channels == 4


# ------------------------------------------------------------------------------------------------------
# Pieces


def test_upsampling_convolution_is_that_of_repeated_pixels(x64):
    conv = UpsampleConv(3, 5, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = normal(1, (2, 4, 7, 3), jnp.float64)
    repeated = x.repeat(2, axis=1).repeat(2, axis=2)
    want = jax.lax.conv_general_dilated(repeated, conv.kernel[...].astype(jnp.float64), (1, 1),
                                        ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(conv(x), want, atol=1e-12)


@pytest.mark.parametrize('dtype, bound', [(jnp.float32, 1e-3), (jnp.bfloat16, 1e-2)])
def test_group_norm_of_values_far_from_zero(dtype, bound):
    """Mean 300, deviation 1 within each group. One pass over sums of squares, or sums in bfloat16, would miss
    by far."""
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(300 + 4 * rng.standard_normal((2, 16, 16, 8)), dtype).astype(jnp.float32))
    norm = GroupNorm(8, 2, rngs=nnx.Rngs(0))
    groups = x.astype(np.float64).reshape(2, -1, 2, 4)
    want = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    got = np.asarray(norm(jnp.asarray(np.asarray(x, dtype))), np.float64)
    assert np.abs(got - want.reshape(x.shape)).max() <= bound * np.abs(want).max()


def test_fresh_parameters():
    """Kernels within 1/sqrt(fan-in), as PyTorch starts convolutions; norms that change nothing."""
    network = VaeNetwork({'widths': (4,), 'layers': 1, 'groups': 2, 'channels': 1, 'mid_attention': False})
    params = jax.jit(network.init)(jax.random.key(0))
    assert jax.tree.map(lambda p: (p.shape, p.dtype),
                        params) == jax.tree.map(lambda p: (p.shape, p.dtype), network.abstract())
    conv, norm = params['encoder']['level0']['resnet0']['conv1'], params['encoder']['level0']['resnet0'][
        'norm1']
    assert 0.8 / 6 < jnp.abs(conv['kernel']).max() <= 1 / 6 and (conv['bias'] == 0).all()
    assert (norm['gain'] == 1).all() and (norm['bias'] == 0).all()
    assert not jnp.array_equal(conv['kernel'], params['encoder']['level0']['resnet0']['conv2']['kernel'])


def test_logvar_is_clamped(tiny):
    network, params = tiny
    params = jax.tree.map(lambda p: p, params)
    params['quant_conv'] = {**params['quant_conv'], 'bias': jnp.array([0., 0., -100., 100.])}
    _, logvar = jax.jit(network.encode)(params, jnp.zeros((1, 4, 4, 3)))
    assert (logvar[..., 0] == -30).all() and (logvar[..., 1] == 20).all()


def test_posterior_sample_has_the_mean_and_deviation_told():
    sample = sample_posterior(jnp.full((100, 10, 10, 1), 3.0), jnp.full((100, 10, 10, 1), 2 * np.log(0.5)),
                              jax.random.key(0))
    assert abs(sample.mean() - 3) < 0.02 and abs(sample.std() - 0.5) < 0.02


@pytest.mark.slow
def test_gradients_reach_every_parameter(tiny):
    """A VAE can be trained: nothing is cut off, and the written-out derivative of attention is used."""
    network, params = tiny
    x, noise = normal(1, (2, 8, 8, 3)), jax.random.key(2)

    @jax.jit
    def loss(params):
        mean, logvar = network.encode(params, x)
        return ((network.decode(params, sample_posterior(mean, logvar, noise)) - x) ** 2).mean() + (
            logvar ** 2).mean()

    gradients = jax.grad(loss)(params)
    size = jnp.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(gradients)))
    step = jax.tree.map(lambda g: 1e-2 * g / size, gradients)
    up, down = (loss(jax.tree.map(lambda p, s, sign=sign: p + sign * s, params, step)) for sign in (1, -1))
    assert abs((up - down) / 2e-2 - size) <= 2e-2 * size
    assert all((jnp.abs(g) > 0).any() for g in jax.tree.leaves(gradients))


# ------------------------------------------------------------------------------------------------------
# One image at a time


def test_one_by_one_is_the_same_in_less_memory(tiny):
    network, params = tiny
    z = normal(1, (8, 16, 16, 2))
    whole, single = (compiled_decode(network, params, z, one_by_one=each) for each in (False, True))
    image = whole(params, z)
    np.testing.assert_allclose(single(params, z), image, atol=1e-5)
    assert temporary_bytes(single) < temporary_bytes(whole) / 3
    encode = jax.jit(network.encode, static_argnames='one_by_one')
    for got, want in zip(encode(params, image, one_by_one=True), encode(params, image), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def compiled_decode(network, params, z, **options):
    return jax.jit(lambda params, z: network.decode(params, z, **options)).lower(params, z).compile()


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def test_one_by_one_on_a_mesh_sends_nothing(tiny):
    """Four devices with two images each: each decodes its own."""
    network, params = tiny
    mesh = jax.make_mesh((2, 2, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3,
                         devices=jax.devices()[:4])
    z = normal(1, (8, 4, 4, 2))
    want = jax.jit(network.decode)(params, z)
    with jax.set_mesh(mesh):
        z = jax.device_put(z, NamedSharding(mesh, P(('data', 'fsdp'))))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        compiled = compiled_decode(network, params, z, one_by_one=True)
        got = compiled(params, z)
    text = compiled.as_text()
    assert not [name for name in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute')
                if name in text]
    assert got.sharding.is_equivalent_to(z.sharding, 4)
    np.testing.assert_allclose(got, want, atol=1e-5)


# ------------------------------------------------------------------------------------------------------
# Tiles


@given(side=st.integers(1, 60), tile=st.integers(1, 60), share=st.floats(0, 0.99),
       downscale=st.sampled_from([1, 2, 8]))
@settings(deadline=None)
def test_tiles_cover_an_axis_and_their_weights_add_up_to_one(side, tile, share, downscale):
    tile = min(side, tile)
    overlap = min(int(share * tile), tile - 1)
    starts, fades = cover(side, tile, overlap, downscale)
    total = np.zeros(side * downscale)
    for start, fade in zip(starts, fades, strict=True):
        total[start * downscale:(start + tile) * downscale] += fade
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert (fades > 0).all() and starts[0] == 0 and starts[-1] == side - tile
    assert (starts[:-1] + tile - starts[1:] >= overlap).all()


def test_a_tile_fades_linearly_where_two_overlap():
    starts, fades = cover(side=6, tile=4, overlap=2, downscale=1)
    assert starts.tolist() == [0, 2]
    np.testing.assert_allclose(fades, [[1, 1, 0.75, 0.25], [0.25, 0.75, 1, 1]])


def test_tiles_of_a_local_decoder_give_the_whole_image():
    """A decoder that looks at one pixel: what tiles change is what the real one's norms and attention make of
    them."""
    z = normal(0, (2, 13, 21, 3))
    double = lambda z: jnp.tanh(z).repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
    np.testing.assert_allclose(decode_tiles(double, z, tile=6, overlap=2, downscale=2), double(z), atol=1e-6)


def test_tiles_of_different_tint_have_no_seams():
    """Each tile comes out as its own mean: between the flat middles brightness goes over in a straight
    line."""
    z = jnp.repeat(jnp.array([0.0, 1.0]), 8)[None, None, :, None] * jnp.ones((1, 4, 16, 1))
    flat = lambda z: jnp.full_like(z, z.mean())  # noqa: E731
    row = decode_tiles(flat, z, tile=10, overlap=4, downscale=1)[0, 0, :, 0]
    assert np.isclose(row[0], 0.2) and np.isclose(row[-1], 0.8)
    np.testing.assert_allclose(np.diff(row)[6:9], 0.6 / 4, atol=1e-6)
    assert np.abs(np.diff(row)).max() <= 0.6 / 4 + 1e-6


def test_tiled_images_are_near_the_whole_one_and_nearer_with_larger_tiles(goldens):
    """Not equal: norms and attention see one tile. With random weights, noise for a latent, in units of the
    image's
    deviation: 0.69 (rms) with tiles of 8, 0.12 with 24 of 32 x 40."""
    network, params, _ = load_golden(goldens / 'vae_two.npz', jnp.float32)
    z = normal(0, (1, 32, 40, 4))
    decode = jax.jit(network.decode, static_argnames='tile')
    whole = decode(params, z)
    errors = [float(jnp.sqrt(jnp.square(decode(params, z, tile=tile) - whole).mean()) / whole.std())
              for tile in (8, 24)]
    assert errors[0] > errors[1] and errors[1] <= 0.15
    assert jnp.array_equal(decode(params, z, tile=40), whole)


def test_memory_of_tiles_does_not_grow_with_the_image(tiny):
    """Of what is held beside the image itself (twice the latent's sides here, 3 channels)."""
    network, params = tiny
    small, large = (temporary_bytes(compiled_decode(network, params, jnp.zeros((1, side, side, 2)), tile=16))
                    for side in (32, 64))
    whole = temporary_bytes(compiled_decode(network, params, jnp.zeros((1, 64, 64, 2))))
    assert large < whole / 3
    assert large - small <= 2 * 4 * 3 * (128 ** 2 - 64 ** 2)


# ------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize('shape, words', [
    ((1, 8, 8, 1), r'\[B, H, W, 3\], got \[1, 8, 8, 1\]'), ((8, 8, 3), 'B, H, W, 3'),
    ((1, 8, 7, 3), 'multiples of 2'), ((1, 0, 8, 3), 'multiples of 2')])
def test_images_that_do_not_fit_are_refused(tiny, shape, words):
    network, params = tiny
    with pytest.raises(UserError, match=words):
        network.encode(params, jnp.zeros(shape))


def test_sides_of_the_full_configuration_are_multiples_of_eight():
    network = VaeNetwork({})
    with pytest.raises(UserError, match='images of 256 x 260 pixels cannot be encoded: .* multiples of 8'):
        jax.eval_shape(network.encode, network.abstract(),
                       jax.ShapeDtypeStruct((1, 256, 260, 3), jnp.float32))


@pytest.mark.parametrize('options, words', [
    ({'tile': 0}, 'at least 1'), ({'tile': 8, 'overlap': 8}, 'cannot overlap by 8'),
    ({'tile': 8, 'overlap': -1}, '0 to 7')])
def test_wrong_tiles_are_refused(tiny, options, words):
    network, params = tiny
    with pytest.raises(UserError, match=words):
        network.decode(params, jnp.zeros((1, 16, 16, 2)), **options)


def test_latents_of_other_channels_are_refused(tiny):
    with pytest.raises(UserError, match=r'latents of this VAE have the shape \[B, H, W, 2\]'):
        tiny[0].decode(tiny[1], jnp.zeros((1, 4, 4, 4)))


@pytest.mark.parametrize('change, words', [
    ({'width': 3}, 'unknown fields width'), ({'layers': 0}, 'vae.layers'),
    ({'widths': (8, 'x')}, r'vae.widths\[1\]'), ({'widths': ()}, 'widths is empty'),
    ({'widths': (8, 18), 'groups': 4}, '18 channels cannot be split into 4'),
    ({'quant_conv': 1}, 'vae.quant_conv'), ({'channels': True}, 'vae.channels')])
def test_architectures_that_cannot_be_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        check_vae_arch(change)
