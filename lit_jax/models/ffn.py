"""The networks of the blocks that act on single tokens (or, with a convolution, on their neighbours), and their table.

Each is an `nnx.Module` with `__init__(self, width, ratio, *, dtype, rngs)` and `__call__(x_BND, grid) -> x_BND`, and a
function `hidden_width(width, ratio)` of the channels that `tensor` cuts.
"""
import jax
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.models.partition import constrain


class Mlp(nnx.Module):
    """Linear, GELU (tanh form, as DiT), Linear: [B, N, D] -> [B, N, D]."""

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


FFNS = {'mlp': Mlp}
