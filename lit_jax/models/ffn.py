"""Feed-forward networks of the blocks and their table: on single tokens, or convolving neighbours.

Each is an `nnx.Module` with `__init__(self, width, ratio, *, dtype, rngs)`, `__call__(x_BND, grid) -> x_BND`,
`hidden_width(width, ratio)`, the channels that `tensor` shards, and `leaves`, its parameters."""
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import fan_in_uniform
from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.facts import Leaf, product
from lit_jax.models.layers import Array, Linear, axes_stay_apart, check_grid, kernel_gradient, row_matmul
from lit_jax.models.mixers.depthwise import depthwise_conv
from lit_jax.models.partition import constrain
from lit_jax.runtime.dtypes import accumulator


def _gelu_parts(x: Array) -> tuple[Array, Array, Array]:
    """x in the accumulator, tanh(u) and u's derivative."""
    x, c = x.astype(accumulator(x.dtype)), math.sqrt(2 / math.pi)
    return x, jnp.tanh(c * x * (1 + 0.044715 * x * x)), c * (1 + 3 * 0.044715 * x * x)


def _gelu_forward(x):
    wide, tanh, _ = _gelu_parts(x)
    return (0.5 * wide * (1 + tanh)).astype(x.dtype), x


def _gelu_slope(x, tangent):
    wide, tanh, du = _gelu_parts(x)
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * du
    return (slope * tangent.astype(wide.dtype)).astype(x.dtype)


# Computed in the accumulator: a TPU v5e has no other vectors. Keeps x alone for the gradient.
gelu = with_derivatives(_gelu_forward, lambda x, tangents: _gelu_slope(x, tangents[0]),
                        lambda x, cotangent: (_gelu_slope(x, cotangent),))


def _gelu_product_forward(x, kernel):
    return row_matmul(_gelu_forward(x)[0], kernel.astype(x.dtype)), (x, kernel)


def _gelu_product_plain(x, kernel):
    # Inside of the product, XLA:TPU would compute GELU once for each block of columns.
    activated = jax.lax.platform_dependent(_gelu_forward(x)[0], tpu=jax.lax.optimization_barrier,
                                           default=lambda h: h)
    return row_matmul(activated, kernel.astype(x.dtype))


def _gelu_product_tangent(residuals, tangents):
    (x, kernel), (dx, dkernel) = residuals, tangents
    return (row_matmul(_gelu_slope(x, dx), kernel.astype(x.dtype))
            + row_matmul(_gelu_forward(x)[0], dkernel.astype(x.dtype)))


def _gelu_product_backward(residuals, g):
    x, kernel = residuals
    dx = _gelu_slope(x, row_matmul(g, kernel.astype(x.dtype).T))
    return dx, kernel_gradient(_gelu_forward(x)[0], g, kernel)


# gelu(x)·kernel, which keeps x, not gelu(x): half of what a feed-forward network keeps.
gelu_product = with_derivatives(_gelu_product_forward, _gelu_product_tangent, _gelu_product_backward,
                                plain=_gelu_product_plain)


class Mlp(nnx.Module):
    """Linear, GELU (tanh form, as DiT), Linear: [B, N, D] -> [B, N, D]."""
    leaves = (*product('fc1', ('D', 'F'), 'linear', 'fc1', ('net.0.proj',)),
              *product('fc2', ('F', 'D'), 'linear', 'fc2', ('net.2',)))

    def __init__(self, width: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = self.hidden_width(width, ratio)
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    @staticmethod
    def hidden_width(width: int, ratio: float) -> int:
        return int(width * ratio)

    @jax.named_scope('ffn')
    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        hidden_BNF = constrain(self.fc1(x_BND), 'batch', 'tokens', 'hidden')
        return self.fc2(gelu(hidden_BNF)) if axes_stay_apart() else self.fc2.flat(hidden_BNF, gelu_product)


class SwiGlu(nnx.Module):
    """down(silu(gate)·y) without biases, where (gate, y) is one product of x: [B, N, D] -> [B, N, D]. The
    hidden width is two thirds of ratio·D, rounded up to a multiple of 256 (DiG): costs about as `Mlp`."""
    leaves = (Leaf('gate/kernel', ('D', 2, 'F'), 'linear', 'gate_proj.weight'),
              Leaf('down/kernel', ('F', 'D'), 'linear', 'down_proj.weight'))

    def __init__(self, width: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = self.hidden_width(width, ratio)
        self.gate = Linear(width, (2, hidden), bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, bias=False, dtype=dtype, rngs=rngs)

    @staticmethod
    def hidden_width(width: int, ratio: float) -> int:
        return 256 * math.ceil(int(width * ratio * 2 / 3) / 256)

    @jax.named_scope('ffn')
    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        hidden = constrain(self.gate(x_BND), 'batch', 'tokens', None, 'hidden')
        return self.down(jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1])


class BiasedSwiGlu(nnx.Module):
    """`SwiGlu` with biases and two thirds of ratio·D inside, rounded down (LightningDiT)."""
    leaves = (*product('gate', ('D', 2, 'F'), 'linear', 'w12'), *product('down', ('F', 'D'), 'linear', 'w3'))

    def __init__(self, width: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = self.hidden_width(width, ratio)
        self.gate = Linear(width, (2, hidden), dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    @staticmethod
    def hidden_width(width: int, ratio: float) -> int:
        return int(2 / 3 * int(width * ratio))

    @jax.named_scope('ffn')
    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        hidden = constrain(self.gate(x_BND), 'batch', 'tokens', None, 'hidden')
        return self.down(jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1])


class PairConv(nnx.Module):
    """Depth-wise 3 x 3 on two parts of F channels each; kernel [3, 3, 2, F], bias [2, F]."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), (3, 3), (2, channels)))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (2, channels), jnp.float32, -1 / 3, 1 / 3))

    def __call__(self, x_BHWF: Array, part: int) -> Array:
        kernel, bias = self.kernel[:, :, part:part + 1], self.bias[part]
        return depthwise_conv(x_BHWF[..., None, :], kernel, bias)[..., 0, :]


class MixFfn(nnx.Module):
    """Sana's Mix-FFN (GLUMBConv; arXiv 2410.10629), whose tokens see their eight neighbours.

    Linear to 2F, SiLU, 3 x 3 depth-wise on the grid, value·SiLU(gate), Linear to D without bias.

    F = int(D·ratio); the ratio is 2.5 in Sana, 4 in DyDi-LiT and its Sana baseline. Value and gate have an
    axis of their own, so that sharding F splits neither. Initialised as PyTorch's convolutions, which all
    three are in the official code (1 x 1 for the Linears)."""
    leaves = (*product('inverted', ('D', 2, 'F'), 'pointwise', 'inverted_conv.conv'),
              *product('depth', (3, 3, 2, 'F'), 'depthwise', 'depth_conv.conv'),
              Leaf('point/kernel', ('F', 'D'), 'pointwise', 'point_conv.conv.weight'))
    hidden_width = staticmethod(Mlp.hidden_width)

    def __init__(self, width: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = self.hidden_width(width, ratio)
        self.inverted = Linear(width, (2, hidden), init=fan_in_uniform, dtype=dtype, rngs=rngs)
        self.inverted.bias = nnx.Param(jax.random.uniform(rngs.params(), (2, hidden), jnp.float32, -1, 1)
                                       * width ** -0.5)
        self.depth = PairConv(hidden, rngs=rngs)
        self.point = Linear(hidden, width, bias=False, init=fan_in_uniform, dtype=dtype, rngs=rngs)

    @jax.named_scope('ffn')
    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        b, n, _ = x_BND.shape
        check_grid(x_BND, grid)
        hidden_BN2F = constrain(jax.nn.silu(self.inverted(x_BND)), 'batch', 'tokens', None, 'hidden')
        value, gate = (self._convolve(hidden_BN2F[:, :, part], part, grid) for part in range(2))
        gated = (value * jax.nn.silu(gate)).reshape(b, n, -1)
        return self.point(constrain(gated, 'batch', 'tokens', 'hidden'))

    def _convolve(self, hidden_BNF: Array, part: int, grid: tuple[int, int]) -> Array:
        image_BHWF = hidden_BNF.reshape(hidden_BNF.shape[0], *grid, -1)
        return self.depth(constrain(image_BHWF, 'batch', 'rows', None, 'hidden'), part)


FFNS: dict[str, Any] = {'mlp': Mlp, 'swiglu': SwiGlu, 'swiglu_bias': BiasedSwiGlu, 'mix': MixFfn}
