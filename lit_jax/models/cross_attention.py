"""Attention from the tokens of an image to those of its caption."""
import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear, zeros_init
from lit_jax.models.partition import constrain
from lit_jax.runtime.dtypes import accumulator


class CrossAttention(nnx.Module):
    """softmax(q·kᵀ/√E)·v with queries from the image, keys and values from the caption; padding is masked.
    The output projection is zero at the start (PixArt), so a new layer changes nothing."""

    def __init__(self, width: int, *, heads: int, dtype, rngs: nnx.Rngs):
        head = (heads, width // heads)
        self.q = Linear(width, head, dtype=dtype, rngs=rngs)
        self.kv = Linear(width, (2, *head), dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, y_BLD: Array, mask_BL: Array) -> Array:
        """x [B, N, D], caption [B, L, D], mask [B, L] (0 is padding) -> [B, N, D]."""
        q_BNKE = constrain(self.q(x_BND), 'batch', 'tokens', 'heads', None)
        kv = constrain(self.kv(y_BLD), 'batch', None, None, 'heads', None)
        return self.proj(masked_attention(q_BNKE, kv[:, :, 0], kv[:, :, 1], mask_BL))


def masked_attention(q_BNKE: Array, k_BLKE: Array, v_BLKE: Array, mask_BL: Array) -> Array:
    """[B, N, K, E] in the dtype of q; logits and sums in the accumulator; keys with mask 0 get no weight.

    A row without any key gives the mean of the values, not NaN: only rows that fill up a batch have none."""
    acc, scale = accumulator(q_BNKE.dtype), q_BNKE.shape[-1] ** -0.5
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BNKE, k_BLKE, v_BLKE))
    logits = jnp.einsum('bkne,bkle->bknl', q, k, preferred_element_type=acc)
    logits = jnp.where(mask_BL[:, None, None, :] != 0, logits * scale, jnp.finfo(acc).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.swapaxes(jnp.einsum('bknl,bkle->bkne', weights, v, preferred_element_type=acc).astype(q.dtype),
                        1, 2)
