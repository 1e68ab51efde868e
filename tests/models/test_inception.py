"""FID-Inception against torch-fidelity's network: random weights, golden files, and each classic mistake."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inception_samples import golden, pixels, torch_state
from torchvision_shim import import_oracle

from lit_jax.convert.inception_weights import read_inception_params
from lit_jax.models.inception import InceptionNetwork, Unit, fold_batch_norm
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

BOUND = 1e-4
GOLDEN_NAMES = {'pool': 'pool3', 'spatial': 'spatial', 'logits': 'logits_unbiased'}


def relative_error(got, want) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@functools.cache
def params() -> dict:
    return jax.device_put(read_inception_params(torch_state(), 'the golden weights', InceptionNetwork()))


def run(network, weights, images) -> dict:
    return jax.jit(network.features, compiler_options=network.inference_options())(weights, images)


def errors_at_64(network, weights=None) -> dict[str, float]:
    """Relative errors against the golden outputs at 64 pixels."""
    found, outputs = run(network, params() if weights is None else weights, pixels(64)), golden()[2]
    return {name: relative_error(found[name], outputs[f'out64_64_{theirs}'])
            for name, theirs in GOLDEN_NAMES.items()}


# ------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize('side', [64, pytest.param(256, marks=pytest.mark.slow)])
def test_golden_features(side):
    meta, _, outputs = golden()
    found = run(InceptionNetwork(), params(), pixels(side))
    for name, theirs in GOLDEN_NAMES.items():
        want = outputs[f'out64_{side}_{theirs}']
        assert found[name].dtype == jnp.float32 and found[name].shape == want.shape
        assert np.abs(found[name] - want).max() <= meta['tol'][f'{side}_{theirs}']['atol_f32'], name
    # Under weights for which all images look alike, the bounds above would mean nothing.
    assert np.abs(found['pool'][0] - found['pool'][1]).mean() > 1e-3


@pytest.mark.slow
def test_golden_features_in_float64(x64):
    """Folding rounds the parameters to float32, which is all that differs from the golden run."""
    folded = read_inception_params(torch_state(), 'the golden weights', InceptionNetwork())
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), folded)
    found = run(InceptionNetwork(), wide, pixels(64))
    for name, theirs in GOLDEN_NAMES.items():
        assert found[name].dtype == jnp.float64
        assert relative_error(found[name], golden()[2][f'out64_64_{theirs}']) <= 1e-6, name


@pytest.fixture(scope='module')
def peer(tmp_path_factory):
    """torch-fidelity's network with the golden weights: images [B, H, W, 3] -> the same three features."""
    oracle = import_oracle('torch_fidelity.feature_extractor_inceptionv3')
    import torch
    path = tmp_path_factory.mktemp('peer') / 'weights.pth'
    torch.save({key: torch.from_numpy(value) for key, value in torch_state().items()}, path)
    network = oracle.FeatureExtractorInceptionV3('peer', ['2048', 'logits_unbiased'],
                                                 feature_extractor_weights_path=str(path))
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def features(images):
        with torch.no_grad():
            pool, logits = network(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
        spatial = seen.pop()[:, :7].numpy().transpose(0, 2, 3, 1)
        return {'pool': pool.numpy(), 'spatial': spatial.reshape(len(images), -1), 'logits': logits.numpy()}

    return features


@pytest.mark.peers
@pytest.mark.parametrize('side', [pytest.param(side, marks=() if side == 32 else pytest.mark.slow)
                                  for side in (32, 64, 128, 256, 299, 512)])
def test_equals_torch_fidelity(peer, side):
    images = pixels(side)
    images[0, :2], images[1, -2:] = 255, 0
    want, found = peer(images), run(InceptionNetwork(), params(), images)
    for name in GOLDEN_NAMES:
        assert relative_error(found[name], want[name]) <= BOUND, name


@pytest.mark.peers
@pytest.mark.slow
def test_images_that_are_not_square(peer):
    images = pixels(128)[:, 10:90]
    want, found = peer(images), run(InceptionNetwork(), params(), images)
    assert max(relative_error(found[name], want[name]) for name in GOLDEN_NAMES) <= BOUND


# ------------------------------------------------------------------------------------------------------
# Each classic mistake is seen


def half_pixel(images, size):
    return jax.image.resize(images.astype(jnp.float32), (len(images), size, size, 3), 'bilinear',
                            antialias=False)


@pytest.mark.parametrize('mistake',
                         [{'count_padding': True}, {'last_pool': 'average'}, {'resize': half_pixel}],
                         ids=lambda options: next(iter(options)))
def test_mistakes_in_the_network(mistake):
    assert errors_at_64(InceptionNetwork(**mistake))['pool'] > 10 * BOUND


def test_mistake_in_the_epsilon():
    state = {key: value - np.float32(1e-3 - 1e-5) if key.endswith('running_var') else value
             for key, value in torch_state().items()}
    errors = errors_at_64(InceptionNetwork(),
                          read_inception_params(state, 'epsilon 1e-5', InceptionNetwork()))
    assert min(errors.values()) > 2 * BOUND


def test_mistakes_in_the_colours_and_the_spatial_features():
    network = InceptionNetwork()
    assert relative_error(run(network, params(), pixels(64)[..., ::-1])['pool'],
                          golden()[2]['out64_64_pool3']) > 10 * BOUND
    taps = np.asarray(jax.jit(network.activations, compiler_options=network.inference_options())(
        params(), pixels(64))['Mixed_6d'])
    want = golden()[2]['out64_64_spatial']
    right = taps[..., :7]
    assert relative_error(right.reshape(2, -1), want) <= BOUND
    for wrong in (taps[..., 1:8], right.transpose(0, 3, 1, 2), right.transpose(0, 2, 1, 3),
                  taps[..., ::-1][..., :7]):
        assert relative_error(wrong.reshape(2, -1), want) > 10 * BOUND


# ------------------------------------------------------------------------------------------------------
# Precision, shapes, folding


def test_every_product_is_pinned_to_the_highest_precision():
    """Also where the session asks for less."""
    network = InceptionNetwork()
    with jax.default_matmul_precision('bfloat16'):
        text = str(jax.make_jaxpr(network.features)(network.abstract(),
                                                    jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)))
    products = text.count('conv_general_dilated[') + text.count('dot_general[')
    # 94 units, of which 1 x 1 units on a block's input are joined, and the head.
    assert products > 60 and text.count('precision=Precision.HIGHEST') + text.count(
        '(Precision.HIGHEST') == products
    assert 'bf16' not in text


@pytest.mark.slow
def test_bfloat16_is_another_network():
    errors = errors_at_64(InceptionNetwork('bfloat16'))
    assert 1e-3 < errors['pool'] < 5e-2


def test_the_published_size():
    leaves = named_leaves(InceptionNetwork().abstract())
    kernels = sum(leaf.size for name, leaf in leaves.items() if name.endswith('kernel'))
    biases = sum(leaf.size for name, leaf in leaves.items() if name.endswith('bias'))
    assert len(leaves) == 2 * 95
    # A batch norm's gain and shift are one bias here: the published count has them both.
    assert kernels + 2 * (biases - 1008) + 1008 == 23_850_960


def test_fresh_parameters():
    """He-normal kernels: under smaller ones every image has the same features."""
    network = InceptionNetwork()
    fresh = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(lambda p: (p.shape, p.dtype),
                        fresh) == jax.tree.map(lambda p: (p.shape, p.dtype), network.abstract())
    unit = Unit(64, 96, (3, 3), rngs=nnx.Rngs(0))
    assert unit.kernel[...].std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_folding_is_batch_norm():
    rng = np.random.default_rng(0)
    kernel, gain, shift, mean, variance = (rng.uniform(0.5, 1.5, shape)
                                           for shape in ((1, 1, 3, 4), *[(4,)] * 4))
    x = rng.normal(size=(5, 3))
    want = (x @ kernel[0, 0] - mean) / np.sqrt(variance + 1e-3) * gain + shift
    folded, bias = fold_batch_norm(kernel, gain, shift, mean, variance)
    np.testing.assert_allclose(x @ folded[0, 0] + bias, want, rtol=1e-6)


@pytest.mark.parametrize('call, words', [
    (lambda: InceptionNetwork('float16'), 'known: highest, bfloat16'),
    (lambda: InceptionNetwork(last_pool='mean'), 'max or average'),
    (lambda: InceptionNetwork().features({}, jnp.zeros((2, 3, 64, 64))),
     r'\[B, H, W, 3\], got \[2, 3, 64, 64\]')])
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
