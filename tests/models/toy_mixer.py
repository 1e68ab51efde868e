"""A mixer from outside the package, whole in one file: what somebody writes who adds their own.

A recipe names it by its import path, `toy_mixer:ToyMixer`.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.facts import Leaf, product
from lit_jax.models.layers import Linear
from lit_jax.models.mixers.mixer import Mixer, head_channels
from lit_jax.models.partition import constrain
from lit_jax.runtime.dtypes import accumulator


class ToyMixer(Mixer):
    """proj(sigmoid(q)·Σ over tokens of softmax(k)·v + skip·v): one number a channel stands between tokens.

    Parameters: 'qk' holds both projections on an axis of two; 'skip' is one number a channel.
    """
    leaves = (*product('qk', ('D', 2, 'K', 'E'), 'linear', 'in_proj'),
              *product('v', ('D', 'K', 'E'), 'linear', 'v_proj'),
              *product('proj', ('K', 'E', 'D'), 'linear_in', 'out_proj'),
              Leaf('skip', ('K', 'E'), 'flat', 'skip_weight'))
    parts = {'q': ('qk', 0), 'k': ('qk', 1), 'v': ('v', None), 'o': ('proj', None)}

    @staticmethod
    def state_bytes(mixer, width, grid) -> int:
        """A sum and its normaliser a channel, in float32."""
        return 2 * 4 * head_channels(mixer, width)[0]

    def __init__(self, width, *, heads: int, skip: float = 1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        head = (heads, width // heads)
        self.dtype = dtype
        self.qk = Linear(width, (2, *head), dtype=dtype, rngs=rngs)
        self.v = Linear(width, head, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)
        self.skip = nnx.Param(jnp.full(head, skip, jnp.float32))

    def __call__(self, x_BND, grid):
        acc = accumulator(self.dtype)
        qk = constrain(self.qk(x_BND), 'batch', 'tokens', None, 'heads', None).astype(acc)
        v_BNKE = constrain(self.v(x_BND), 'batch', 'tokens', 'heads', None).astype(acc)
        mean_B1KE = (jax.nn.softmax(qk[:, :, 1], axis=1) * v_BNKE).sum(1, keepdims=True)
        mixed = jax.nn.sigmoid(qk[:, :, 0]) * mean_B1KE + self.skip[...].astype(acc) * v_BNKE
        return self.proj(mixed.astype(self.dtype))
