"""Softmax self-attention as in DiT: one qkv projection, scale E^-0.5, no norm of queries and keys."""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear, accumulator


class SoftmaxAttention(nnx.Module):
    """Multi-head attention over all tokens: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        head_dim = width // heads
        self.qkv = Linear(width, (3, heads, head_dim), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear((heads, head_dim), width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """grid is not used: without positions in the tokens, their order does not matter here."""
        qkv = self.qkv(x_BND)
        q_BNKE, k_BNKE, v_BNKE = (qkv[:, :, i] for i in range(3))
        return self.proj(dot_product_attention(q_BNKE, k_BNKE, v_BNKE))


def dot_product_attention(q_BNKE: Array, k_BNKE: Array, v_BNKE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v for each head, [B, N, K, E] in the dtype of q; logits and sums in the accumulator."""
    dtype, acc = q_BNKE.dtype, accumulator(q_BNKE.dtype)
    logits = jnp.einsum('bqke,bnke->bkqn', q_BNKE, k_BNKE, preferred_element_type=acc) / math.sqrt(q_BNKE.shape[-1])
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum('bkqn,bnke->bqke', weights.astype(dtype), v_BNKE, preferred_element_type=acc).astype(dtype)
