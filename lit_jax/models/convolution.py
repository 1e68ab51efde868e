"""Convolutions over an image or the token grid, and group norm. NHWC; D is the width (channels)."""
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array
from lit_jax.runtime.dtypes import accumulator

_NHWC = ('NHWC', 'HWIO', 'NHWC')


def fan_in_uniform(key: Array, in_shape: Sequence[int], out_shape: Sequence[int]) -> Array:
    """Uniform within ±1/sqrt(fan-in), PyTorch's initialisation of convolutions."""
    bound = math.prod(in_shape) ** -0.5
    return jax.random.uniform(key, (*in_shape, *out_shape), jnp.float32, -bound, bound)


class Conv(nnx.Module):
    """A convolution with bias, [B, H, W, I] -> [B, H', W', O]; kernel [k, k, I, O]. `padding`: zero rows (and
    columns) before and after. Sums have XLA's precision for the compute dtype."""

    def __init__(self, width_in: int, width_out: int, size: int = 3, *, stride: int = 1,
                 padding: tuple[int, int] = (1, 1), dtype, rngs: nnx.Rngs):
        self.stride, self.padding, self.dtype = stride, padding, dtype
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), (size, size, width_in), (width_out,)))
        self.bias = nnx.Param(jnp.zeros((width_out,), jnp.float32))

    def __call__(self, x_BHWI: Array) -> Array:
        return self.add_bias(self.convolve(x_BHWI, self.kernel[...], self.padding, self.padding))

    def convolve(self, x_BHWI: Array, kernel: Array, rows: tuple[int, int],
                 columns: tuple[int, int]) -> Array:
        """The convolution with any kernel and padding and no bias, in the compute dtype."""
        return jax.lax.conv_general_dilated(x_BHWI.astype(self.dtype), kernel.astype(self.dtype),
                                            (self.stride,) * 2, (rows, columns), dimension_numbers=_NHWC)

    def add_bias(self, y_BHWO: Array) -> Array:
        return y_BHWO + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Norm over all pixels and the channels of a group, with gain and bias; statistics in the accumulator.
    The published autoencoders have epsilon 1e-6; PyTorch's default is 1e-5."""

    def __init__(self, width: int, groups: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        self.groups, self.epsilon = groups, epsilon
        self.gain = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x_BHWD: Array) -> Array:
        """Returns the dtype of x."""
        x = x_BHWD.astype(accumulator(x_BHWD.dtype))
        mean_BG = self._mean(x)
        centred = x - self._spread(mean_BG)
        inverse_BG = jax.lax.rsqrt(self._mean(jnp.square(centred)) + self.epsilon)
        return (centred * (self._spread(inverse_BG) * self.gain[...]) + self.bias[...]).astype(x_BHWD.dtype)

    def _mean(self, x_BHWD: Array) -> Array:
        """[B, G]. Columns, then rows: XLA:CPU runs two sums in parallel, but not one sum over both axes."""
        b, h, w, d = x_BHWD.shape
        sums_BD = x_BHWD.sum(2).sum(1)
        return sums_BD.reshape(b, self.groups, d // self.groups).sum(-1) / (h * w * (d // self.groups))

    def _spread(self, s_BG: Array) -> Array:
        """[B, G] -> [B, 1, 1, D]."""
        return jnp.repeat(s_BG, self.gain.shape[0] // self.groups, axis=1)[:, None, None]
