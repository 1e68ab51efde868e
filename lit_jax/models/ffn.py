"""Feed-forward networks of the blocks and their table: on single tokens, or convolving neighbours.

Each is an `nnx.Module` with `__init__(self, width, ratio, *, dtype, rngs)`, `__call__(x_BND, grid) -> x_BND`,
`hidden_width(width, ratio)`, the channels that `tensor` shards, and `leaves`, its parameters."""
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import fan_in_uniform
from lit_jax.models.facts import Leaf, product
from lit_jax.models.layers import Array, Linear, check_grid
from lit_jax.models.mixers.depthwise import depthwise_conv
from lit_jax.models.partition import constrain


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
        return self.fc2(jax.nn.gelu(hidden_BNF, approximate=True))


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
