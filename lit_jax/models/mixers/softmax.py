"""Softmax self-attention as in DiT: one qkv projection, scale E^-0.5, no norm of queries and keys.

With `compress` the keys and values of r x r tokens become one (PixArt-Σ, arXiv 2403.04692).
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.models.mixers.fused import fused_attention
from lit_jax.models.partition import constrain, partition_spec
from lit_jax.models.probe import show
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError


class KeyCompressor(nnx.Module):
    """r x r neighbours of the grid -> one token: a depth-wise convolution of that size and stride, then a
    LayerNorm.

    The norm is over all heads together, with gain and bias and epsilon 1e-5 (PyTorch's default). At the start
    the convolution takes the mean. One channel of one head has one kernel; heads stay an axis, so that
    `tensor` cuts them.
    """

    def __init__(self, head: tuple[int, int], rate: int):
        self.rate = rate
        self.kernel = nnx.Param(jnp.full((rate, rate, *head), rate ** -2, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(head, jnp.float32))
        self.norm_gain = nnx.Param(jnp.ones(head, jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros(head, jnp.float32))

    def __call__(self, x_BNKE: Array, grid: tuple[int, int]) -> Array:
        """[B, N, K, E] -> [B, N/r², K, E] in the dtype of x; sums and norm in the accumulator."""
        r, (rows, columns) = self.rate, grid
        if rows % r or columns % r:
            raise UserError(f'mixer.compress {r} does not divide the grid of {rows} x {columns} tokens')
        acc = accumulator(x_BNKE.dtype)
        b, _, *head = x_BNKE.shape
        patches = x_BNKE.astype(acc).reshape(b, rows // r, r, columns // r, r, *head)
        x = (patches * self.kernel[...].astype(acc)[:, None]).sum((2, 4)) + self.bias[...].astype(acc)
        centred = x - x.mean((-2, -1), keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean((-2, -1), keepdims=True) + 1e-5)
        x = normed * self.norm_gain[...].astype(acc) + self.norm_bias[...].astype(acc)
        return x.reshape(b, -1, *head).astype(x_BNKE.dtype)


class SoftmaxAttention(nnx.Module):
    """Multi-head attention over all tokens: [B, N, D] -> [B, N, D].

    Args:
        compress: r; one key and value for each r x r tokens (the same `KeyCompressor` for both), 1 for one
            each.
    """

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = True, compress: int = 1, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        if isinstance(compress, bool) or not isinstance(compress, int) or compress < 1:
            raise UserError(f'mixer.compress must be a positive integer (1: keys and values as they are), '
                            f'got {compress!r}')
        head = (heads, width // heads)
        self.qkv = Linear(width, (3, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)
        self.compressor = KeyCompressor(head, compress) if compress > 1 else None

    @staticmethod
    def row_unit(mixer) -> int:
        """Rows of tokens that become one row of keys."""
        return mixer.get('compress', 1)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` matters to `compress` only: attention sees positions only through what the tokens carry."""
        qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
        q_BNKE, k_BMKE, v_BMKE = (qkv[:, :, i] for i in range(3))
        if self.compressor is not None:
            k_BMKE, v_BMKE = (constrain(self.compressor(a, grid), 'batch', 'tokens', 'heads', None)
                              for a in (k_BMKE, v_BMKE))
        return self.proj(dot_product_attention(q_BNKE, k_BMKE, v_BMKE))


def dot_product_attention(q_BNKE: Array, k_BMKE: Array, v_BMKE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v for each head, [B, N, K, E] in the dtype of q; logits and sums in the accumulator.

    On a mesh each device attends for its own images, heads and queries; keys and values are gathered along
    `seq`. Reverse-mode derivatives of first order only. Shows 'softmax/query' and 'softmax/key'.
    """
    show('softmax/query', q_BNKE)
    show('softmax/key', k_BMKE)
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return heads_first(_on_mesh(*map(heads_first, (q_BNKE, k_BMKE, v_BMKE))))


def _on_mesh(q_BKNE: Array, k_BKME: Array, v_BKME: Array) -> Array:
    if jax.sharding.get_abstract_mesh().size <= 1:
        return fused_attention(q_BKNE, k_BKME, v_BKME)
    # By hand: a kernel cannot be cut by the compiler, and a loop over heads would gather them all.
    rows = partition_spec(q_BKNE.shape, 'batch', 'heads', 'tokens', None)
    whole = partition_spec(k_BKME.shape, 'batch', 'heads', None, None)
    return jax.shard_map(fused_attention, in_specs=(rows, whole, whole), out_specs=rows, check_vma=False)(
        q_BKNE, k_BKME, v_BKME)
