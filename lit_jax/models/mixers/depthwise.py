"""The depth-wise convolution of linear attention: a small kernel per channel of a head, shared by heads.

One sum in several forms, because none is fast everywhere (figures: docs/internals/benchmarks.md):

- `shifted`: k² multiply-adds of shifted slices, and a loop over pixels for the weight gradient. The default
  on CPU, where XLA's grouped convolution is tens of times slower. On a sharded grid shifts are exchanges.
- `channels`: `conv_general_dilated` with the channels of all heads as one axis. The default elsewhere, and
  wherever rows of the grid are sharded: it partitions into one halo exchange each way.
- `batch`: the same convolution with the heads folded into the batch: no tiled kernel, but a transposition."""
import functools
from typing import cast

import jax
import jax.numpy as jnp

from lit_jax.models.layers import Array
from lit_jax.models.partition import mesh_axis_size
from lit_jax.runtime.dtypes import accumulator


@jax.named_scope('depthwise')
def depthwise_conv(x_BHWKE: Array, kernel_kk1E: Array, bias_E: Array, form: str | None = None) -> Array:
    """Convolves each channel of each head with its own k x k kernel, zero padding: [B, H, W, K, E]. k is odd.
    Sums in the accumulator, returns the dtype of x. `form`: a key of FORMS; None takes `channels` if the mesh
    in effect (`jax.set_mesh`) shards the sequence, else the platform's fastest. First-order reverse-mode
    derivatives only."""
    if form is None and mesh_axis_size('seq') > 1:
        form = 'channels'
    acc = accumulator(x_BHWKE.dtype)
    y = _convolve(form, x_BHWKE.astype(acc), kernel_kk1E.astype(acc))
    return (y + bias_E.astype(acc)).astype(x_BHWKE.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(form: str | None, x: Array, kernel: Array) -> Array:
    return _by_platform(form, {name: forward for name, (forward, _) in FORMS.items()}, x, kernel)


def _convolve_forward(form, x, kernel):
    return _convolve(form, x, kernel), (x, kernel)


def _convolve_backward(form, residuals, cotangent):
    return _by_platform(form, {name: backward for name, (_, backward) in FORMS.items()}, *residuals,
                        cotangent)


_convolve.defvjp(_convolve_forward, _convolve_backward)


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
    padded, y = _pad(x, size), cast(Array, 0)
    for i in range(size):
        for j in range(size):
            y = y + padded[:, i:i + h, j:j + w] * kernel[i, j, 0]
    return y


def _shifted_backward(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    return _shifted(cotangent, kernel[::-1, ::-1]), _weight_gradient(x, cotangent, kernel.shape[0])


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
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', feature_group_count=x.shape[-1],
                                        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


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
        return jax.vjp(forward, x, kernel)[1](cotangent)
    return backward


# name -> (forward(x, kernel), backward(x, kernel, cotangent) -> cotangents of x and kernel)
FORMS = {'shifted': (_shifted, _shifted_backward),
         'channels': (_channels, _backward_of(_channels)),
         'batch': (_batch, _backward_of(_batch))}
