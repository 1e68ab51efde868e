"""Token-wise networks of the blocks."""
import jax
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.models.partition import constrain


class Mlp(nnx.Module):
    """Linear, GELU (tanh form, as DiT), Linear: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, ratio: float, *, dtype, rngs: nnx.Rngs):
        hidden = int(width * ratio)
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array) -> Array:
        hidden_BNF = constrain(self.fc1(x_BND), 'batch', 'tokens', 'hidden')
        return self.fc2(jax.nn.gelu(hidden_BNF, approximate=True))
