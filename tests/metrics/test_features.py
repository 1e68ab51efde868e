"""Features: the same bits on any devices, for any batch and any form of the same images; wrong images are
refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_samples import pixels, torch_state

from lit_jax.convert.inception_weights import Inception, read_inception_params
from lit_jax.metrics.features import FeatureExtractor
from lit_jax.models.inception import InceptionNetwork
from lit_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures('two_devices')

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 6, 5, 3)).astype(np.uint8)
MATRIX = np.random.default_rng(1).normal(size=(90, 17)).astype(np.float32)


def small(params, images):
    """A stand-in whose bits depend on how many images are computed together."""
    x = jnp.tanh((images.astype(jnp.float32) / 255).reshape(len(images), -1) @ params)
    return {'pool': x, 'spatial': x[:, :3] ** 2, 'logits': x}


def extractor(devices=8, group=2) -> FeatureExtractor:
    return FeatureExtractor(fn=small, params=MATRIX, devices=jax.devices()[:devices], group=group)


@pytest.fixture(scope='module')
def want():
    return extractor(1).extract(IMAGES)


def equal(a, b) -> bool:
    return np.array_equal(a.pool, b.pool) and np.array_equal(a.spatial, b.spatial)


def test_features_are_those_of_the_function(want):
    whole = small(MATRIX, IMAGES)
    assert want.pool.shape == (21, 17) and want.spatial.shape == (21, 3) and want.pool.dtype == np.float32
    # Within tanh float32 sums that cancel: processors round them differently by some 1e-6.
    np.testing.assert_allclose(want.pool, whole['pool'], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(want.spatial, whole['spatial'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('devices', [1, 2, 3, 8])
@pytest.mark.parametrize('batch_size', [0, 1, 32, 1000])
def test_bits_do_not_depend_on_devices_or_batches(want, devices, batch_size):
    assert equal(extractor(devices).extract(IMAGES, batch_size), want)


@pytest.mark.parametrize('count', [1, 2, 15, 16, 17])
def test_any_number_of_pixels(want, count):
    """What is filled up to whole groups leaves no trace: the rest are the bits of the whole set."""
    found = extractor().extract(IMAGES[:count])
    assert found.pool.shape == (count, 17)
    whole_groups = count // 2 * 2
    assert np.array_equal(found.pool[:whole_groups], want.pool[:whole_groups])
    np.testing.assert_allclose(found.pool, want.pool[:count], rtol=1e-5, atol=1e-6)


def test_forms_of_the_same_pixels(tmp_path, want):
    np.save(tmp_path / 'x.npy', IMAGES)
    mapped = np.load(tmp_path / 'x.npy', mmap_mode='r')
    parts = [IMAGES[:1], IMAGES[1:1], IMAGES[1:14], IMAGES[14:]]
    for source in (mapped, parts, iter(parts), (image[None] for image in IMAGES), jnp.asarray(IMAGES)):
        assert equal(extractor().extract(source), want)


def test_a_stream_reads_no_further_than_it_must():
    """Memory for what is on its way: two waves of one group here, and the part that is being read."""
    taken = []

    def parts():
        for i in range(10):
            taken.append(i)
            yield IMAGES[:2]

    counts = []
    for part in extractor(devices=1).stream(parts()):
        counts.append(len(part.pool))
        assert len(taken) <= len(counts) + 2
    assert counts == [2] * 10


def test_progress_counts_every_image_once():
    class Counter:
        total = 0

        def add(self, count):
            self.total += count

    counter = Counter()
    extractor(3).extract(IMAGES, progress=counter)
    assert counter.total == len(IMAGES)


def test_a_plain_function_of_other_pixels():
    shades = np.linspace(-1, 1, 7 * 8 * 8).reshape(7, 8, 8, 1).astype(np.float32)
    found = FeatureExtractor(fn=lambda params, x: x.mean(1) * params, params=np.float32(2),
                             group=3).extract(shades)
    assert found.spatial is None and found.pool.shape == (7, 8)
    np.testing.assert_allclose(found.pool, 2 * shades.mean(1)[..., 0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------
# Inception itself


@pytest.fixture(scope='module')
def inception():
    return Inception(InceptionNetwork(), read_inception_params(torch_state(), 'golden', InceptionNetwork()),
                     'ab' * 32, 'golden')


@pytest.mark.slow
def test_inception_gives_the_same_bits_on_one_and_on_eight_devices(inception):
    images = np.concatenate([pixels(64), pixels(64)[:, ::-1], pixels(64)[:, :, ::-1]])[:5]
    one = FeatureExtractor(inception, devices=jax.devices()[:1], group=2).extract(images)
    eight = FeatureExtractor(inception, devices=jax.devices(), group=2).extract(images, batch_size=1)
    assert one.pool.shape == (5, 2048) and one.spatial.shape == (5, 2023) and equal(one, eight)
    assert np.abs(one.pool[0] - one.pool[1]).mean() > 1e-3
    direct = jax.jit(inception.network.features)(inception.params, images)
    np.testing.assert_allclose(one.pool, direct['pool'], atol=1e-5 * np.abs(one.pool).max())
    np.testing.assert_allclose(one.spatial, direct['spatial'], atol=1e-5 * np.abs(one.spatial).max())


U8 = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize('images, words', [
    (U8.astype(np.float32), 'float32 .*; expected uint8.*round them'),
    (U8.astype(np.int64), 'images: int64'), (U8.transpose(0, 3, 1, 2), 'channels are first'),
    (U8[0], 'One image'), (U8[..., :1], 'Shades of grey'), (U8[..., 0], 'Shades of grey'),
    (U8[..., [0, 1, 2, 0]], 'fourth channel'), (U8[..., :2], r'uint8 \[2, 32, 32, 2\]'),
    (U8[:, :0], r'\[2, 0, 32, 3\]'), (U8[:0], 'no images'), ([], 'no images'),
    ([U8, U8[:, :16]], r'the first have \[32, 32, 3\] uint8, later ones \[16, 32, 3\]'), (5, 'got 5')])
def test_wrong_images_are_refused(inception, images, words):
    with pytest.raises(UserError, match=words):
        FeatureExtractor(inception, group=1).extract(images if not isinstance(images, list) else iter(images))


def test_wrong_calls(inception):
    with pytest.raises(UserError, match='one of the two'):
        FeatureExtractor(inception, fn=small)
    with pytest.raises(UserError, match='one of the two'):
        FeatureExtractor()
    with pytest.raises(UserError, match='group must be at least 1'):
        FeatureExtractor(inception, group=0)
