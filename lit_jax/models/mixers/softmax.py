"""Softmax self-attention as in DiT: one qkv projection, scale E^-0.5, no norm of queries and keys."""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.models.mixers.fused import fused_attention
from lit_jax.models.partition import constrain, partition_spec


class SoftmaxAttention(nnx.Module):
    """Multi-head attention over all tokens: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        head_dim = width // heads
        self.qkv = Linear(width, (3, heads, head_dim), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear((heads, head_dim), width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` is not used: attention sees positions only through what the tokens carry."""
        qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
        q_BNKE, k_BNKE, v_BNKE = (qkv[:, :, i] for i in range(3))
        return self.proj(dot_product_attention(q_BNKE, k_BNKE, v_BNKE))


def dot_product_attention(q_BNKE: Array, k_BNKE: Array, v_BNKE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v for each head, [B, N, K, E] in the dtype of q; logits and sums in the accumulator.

    On a mesh each device attends for its own images, heads and queries; keys and values are gathered along `seq`.
    Reverse-mode derivatives of first order only.
    """
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return heads_first(_on_mesh(*map(heads_first, (q_BNKE, k_BNKE, v_BNKE))))


def _on_mesh(q_BKNE: Array, k_BKNE: Array, v_BKNE: Array) -> Array:
    if jax.sharding.get_abstract_mesh().size <= 1:
        return fused_attention(q_BKNE, k_BKNE, v_BKNE)
    # By hand: a kernel cannot be cut by the compiler, and a loop over heads would gather them all.
    rows = partition_spec(q_BKNE.shape, 'batch', 'heads', 'tokens', None)
    whole = partition_spec(k_BKNE.shape, 'batch', 'heads', None, None)
    return jax.shard_map(fused_attention, in_specs=(rows, whole, whole), out_specs=rows, check_vma=False)(
        q_BKNE, k_BKNE, v_BKNE)
