"""The depth-wise convolution of linear attention: a small kernel per channel of a head, shared by heads.

One sum in several forms, because none is fast everywhere (figures: docs/internals/benchmarks.md):

- `shifted`: k² multiply-adds of shifted slices, and a loop over pixels for the weight gradient. The default
  on CPU, where XLA's grouped convolution is tens of times slower. On a sharded grid shifts are exchanges.
- `channels`: `conv_general_dilated` with the channels of all heads as one axis. The default elsewhere, and
  wherever rows of the grid are sharded: it partitions into one halo exchange each way.
- `batch`: the same convolution with the heads folded into the batch: no tiled kernel, but a transposition."""
from typing import cast

import jax
import jax.numpy as jnp

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.layers import Array
from lit_jax.models.partition import mesh_axis_size
from lit_jax.runtime.dtypes import accumulator


@jax.named_scope('depthwise')
def depthwise_conv(x_BHWKE: Array, kernel_kk1E: Array, bias_E: Array, form: str | None = None,
                   dtype=None) -> Array:
    """Convolves each channel of each head with its own k x k kernel, zero padding: [B, H, W, K, E]. k is odd.
    Sums in the accumulator, returns `dtype`, that of x if None. `form`: a key of FORMS; None takes `channels`
    if the mesh in effect (`jax.set_mesh`) shards the sequence, else the platform's fastest. First derivatives
    only."""
    if form is None and mesh_axis_size('seq') > 1:
        form = 'channels'
    acc = accumulator(x_BHWKE.dtype)
    y = _convolve(form, x_BHWKE.shape, x_BHWKE, kernel_kk1E.astype(acc))
    return (y + bias_E.astype(acc)).astype(dtype or x_BHWKE.dtype)


@jax.named_scope('depthwise')
def depthwise_tokens(x_BND: Array, grid: tuple[int, int], kernel_kk1E: Array, bias_E: Array) -> Array:
    """`depthwise_conv` of tokens whose heads lie one behind the other, D = K·E: [B, N, D] in the accumulator.
    Keeps x as it is for the gradient, which others keep as well."""
    (b, _, width), acc = x_BND.shape, accumulator(x_BND.dtype)
    heads = width // bias_E.size
    kernel, bias = (jnp.tile(a.astype(acc), (*[1] * (a.ndim - 1), heads)) for a in (kernel_kk1E, bias_E))
    return _convolve(None, (b, *grid, 1, width), x_BND, kernel).reshape(x_BND.shape) + bias


# shape: [B, H, W, K, E] of x, which may come with other axes.


def _convolve_forward(form, shape, x, kernel):
    y = _by_platform(form, {name: forward for name, (forward, _) in FORMS.items()}, x.reshape(shape), kernel)
    return y, (x, kernel)


def _convolve_tangent(form, shape, residuals, tangents):
    (x, kernel), (dx, dkernel) = residuals, tangents      # each in its own dtype
    return _convolve_forward(form, shape, dx, kernel)[0] + _convolve_forward(form, shape, x, dkernel)[0]


def _convolve_backward(form, shape, residuals, cotangent):
    x, kernel = residuals
    dx, dkernel = _by_platform(form, {name: backward for name, (_, backward) in FORMS.items()},
                               x.reshape(shape), kernel, cotangent)
    return dx.reshape(x.shape), dkernel


_convolve = with_derivatives(_convolve_forward, _convolve_tangent, _convolve_backward, static=2)


def _by_platform(form: str | None, functions: dict, *args):
    """The given form, or the platform's, chosen when the program is lowered, so also for another machine."""
    if form is not None:
        return functions[form](*args)
    return jax.lax.platform_dependent(*args, cpu=functions['shifted'], default=functions['channels'])


def _pad(x: Array, size: int) -> Array:
    reach = size // 2
    return jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))


def _shifted(x: Array, kernel: Array) -> Array:
    size, (_, h, w, _, _) = kernel.shape[0], x.shape
    padded, y = _pad(x.astype(kernel.dtype), size), cast(Array, 0)
    for i in range(size):
        for j in range(size):
            y = y + padded[:, i:i + h, j:j + w] * kernel[i, j, 0]
    return y


def _shifted_backward(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    dx = _shifted(cotangent, kernel[::-1, ::-1]).astype(x.dtype)
    return dx, _weight_gradient(x.astype(kernel.dtype), cotangent, kernel.shape[0])


def _weight_gradient(x: Array, cotangent: Array, size: int) -> Array:
    """Σ over pixels of (the k x k patch around the pixel) · (its cotangent), one pixel after the other. The
    k² products stay in cache; k² sums over whole images would read them k² times. The batch is summed at the
    end, so that a sharded batch needs one collective, not one for each pixel."""
    b, h, w, heads, channels = x.shape
    padded = _pad(x, size)

    def add_pixel(n, total):
        row, column = n // w, n % w
        patch = jax.lax.dynamic_slice(padded, (0, row, column, 0, 0), (b, size, size, heads, channels))
        pixel = jax.lax.dynamic_slice(cotangent, (0, row, column, 0, 0), (b, 1, 1, heads, channels))
        return total + patch * pixel

    total = jax.lax.fori_loop(0, h * w, add_pixel, jnp.zeros((b, size, size, heads, channels), x.dtype))
    return total.sum((0, 3))[:, :, None]


def _grouped_convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), 'SAME', feature_group_count=x.shape[-1],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'), preferred_element_type=accumulator(x.dtype))


def _channels(x: Array, kernel: Array) -> Array:
    b, h, w, heads, channels = x.shape
    y = _grouped_convolution(x.reshape(b, h, w, heads * channels), jnp.tile(kernel, (1, 1, 1, heads)))
    return y.reshape(x.shape)


def _batch(x: Array, kernel: Array) -> Array:
    b, h, w, heads, channels = x.shape
    y = _grouped_convolution(x.transpose(0, 3, 1, 2, 4).reshape(b * heads, h, w, channels), kernel)
    return y.reshape(b, heads, h, w, channels).transpose(0, 2, 3, 1, 4)


def _backward_of(forward):
    def backward(x, kernel, cotangent):
        dx = forward(cotangent.astype(x.dtype), kernel[::-1, ::-1]).astype(x.dtype)
        wide = x.astype(kernel.dtype)
        return dx, jax.vjp(lambda kernel: forward(wide, kernel), kernel)[1](cotangent)[0]
    return backward


# x in any dtype, products in it; kernel, sums and cotangents in its accumulator
# name -> (forward(x, kernel), backward(x, kernel, cotangent) -> cotangents of x and kernel)
FORMS = {'shifted': (_shifted, _shifted_backward),
         'channels': (_channels, _backward_of(_channels)),
         'batch': (_batch, _backward_of(_batch))}
