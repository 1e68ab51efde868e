"""TensorFlow 1's resize, to the last bit."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights
from torchvision_shim import import_oracle

from lit_jax.models.resize import positions, resize_tf1

ROWS = np.unique(np.r_[0:3, 0:299:13, 296:299])       # those that the golden file keeps
resize = jax.jit(resize_tf1, static_argnames='size')


@pytest.mark.parametrize('side', [32, 64, 128, 256, 304, 512])
def test_bits_of_tensorflow(side, goldens):
    meta, _, arrays = weights.load(goldens / 'metrics_resize.npz')
    image = weights.images(meta['images']['seed'], f'size{side}', 1, side, side)
    image[:, 0, 0], image[:, -1, -1] = 255, 0
    got = np.asarray(resize(image))
    assert got.shape == (1, 299, 299, 3) and got.dtype == np.float32
    assert np.array_equal(got[:, ROWS][:, :, ROWS], arrays[f'out_resized_{side}'])
    assert got.astype(np.float64).sum() == pytest.approx(arrays[f'sum_resized_{side}'], rel=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize('height, width, size',
                         [(32, 32, 299), (150, 100, 299), (299, 299, 299), (512, 512, 299), (9, 7, 20)])
def test_bits_of_torch_fidelity(height, width, size):
    oracle = import_oracle('torch_fidelity.interpolate_compat_tensorflow')
    import torch
    image = np.random.default_rng(height).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    want = oracle.interpolate_bilinear_2d_like_tensorflow1x(torch.from_numpy(image.transpose(0, 3, 1, 2)),
                                                            size=(size, size),
                                                            align_corners=False).numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(resize(image, size), want)
    # Also where what follows could be joined with it: scaled as the network scales.
    scaled = jax.jit(lambda x: (resize_tf1(x, size) - 128) / 128)(image)
    assert np.array_equal(scaled, (want - 128) / 128)


def test_one_pixel_and_flat_images():
    assert np.array_equal(resize(np.full((1, 1, 1, 3), 7, np.uint8), 5), np.full((1, 5, 5, 3), 7, np.float32))
    assert np.array_equal(resize(np.full((1, 64, 80, 3), 255, np.uint8)),
                          np.full((1, 299, 299, 3), 255, np.float32))


def test_the_last_pixel_is_clamped():
    left, right, weight = positions(2, 4)
    assert left.tolist() == [0, 0, 1,
                             1] and right.tolist() == [1, 1, 1, 1] and weight.tolist() == [0, 0.5, 0, 0.5]


def test_other_resizes_differ():
    """What FID must not be computed with: half-pixel centres, and with smoothing."""
    image = np.random.default_rng(0).integers(0, 256, (1, 512, 512, 3)).astype(np.float32)
    want = np.asarray(resize(image))
    for antialias in (False, True):
        other = jax.image.resize(jnp.asarray(image), (1, 299, 299, 3), 'bilinear', antialias=antialias)
        assert np.abs(other - want).mean() > 5
