"""Feed-forward networks of the blocks, and their table: on single tokens, or with a convolution on
neighbours.

Each is an `nnx.Module` with `__init__(self, width, ratio, *, dtype, rngs)`, `__call__(x_BND, grid) -> x_BND`,
`hidden_width(width, ratio)`, the channels that `tensor` shards, and `leaves`, its parameters."""
import math
from typing import Any

import jax
from flax import nnx

from lit_jax.models.facts import Leaf, product
from lit_jax.models.ffn_mix import MixFfn
from lit_jax.models.layers import Array, Linear
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

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        hidden = constrain(self.gate(x_BND), 'batch', 'tokens', None, 'hidden')
        return self.down(jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1])


FFNS: dict[str, Any] = {'mlp': Mlp, 'swiglu': SwiGlu, 'mix': MixFfn}
