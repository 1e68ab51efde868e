"""TensorFlow 1's bilinear resize, part of the graph that defines FID.

`jax.image.resize` and PyTorch's interpolation differ: they put pixel centres at half-integers, and the former
smooths where it shrinks. TensorFlow 1's `ResizeBilinear` (align_corners=False, half_pixel_centers=False)
reads output pixel i at source position i · length / size, between floor(position) and its right-hand
neighbour, clamped at the border, and never smooths. Columns are blended first, then rows."""
import jax.numpy as jnp
import numpy as np

from lit_jax.models.layers import Array


def resize_tf1(image_BHWC: Array, size: int = 299) -> Array:
    """[B, H, W, C] of any real dtype -> float32 [B, size, size, C], the bits of TensorFlow 1 on a CPU."""
    x = jnp.asarray(image_BHWC).astype(jnp.float32)
    return _blend(_blend(x, size, axis=2), size, axis=1)


def positions(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(left index, right index, weight of the right one), each [size]; the weights float32."""
    source = np.arange(size, dtype=np.float32) * np.float32(length / size)
    left = source.astype(np.int32)
    return left, np.minimum(left + 1, length - 1), source - left.astype(np.float32)


def _blend(x: Array, size: int, axis: int) -> Array:
    left, right, weight = positions(x.shape[axis], size)
    below, above = jnp.take(x, left, axis), jnp.take(x, right, axis)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    # The minimum changes no value. It keeps compilers from making one operation of the product and the sum,
    # which is rounded once instead of twice and differs in the last bit.
    return below + jnp.minimum((above - below) * weight, jnp.finfo(jnp.float32).max)
