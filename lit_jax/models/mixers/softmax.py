"""Softmax self-attention as in DiT: one qkv projection, scale E^-0.5, no norm of queries and keys."""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear, accumulator

CHUNK = 256                   # queries taken at once where the map of all pairs is not held whole
WHOLE_MAP_BYTES = 2 ** 30     # the largest map held whole on accelerators, for all heads and images together


class SoftmaxAttention(nnx.Module):
    """Multi-head attention over all tokens: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        head_dim = width // heads
        self.qkv = Linear(width, (3, heads, head_dim), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear((heads, head_dim), width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` is not used: attention sees positions only through what the tokens carry."""
        qkv = self.qkv(x_BND)
        q_BNKE, k_BNKE, v_BNKE = (qkv[:, :, i] for i in range(3))
        return self.proj(dot_product_attention(q_BNKE, k_BNKE, v_BNKE))


def dot_product_attention(q_BNKE: Array, k_BNKE: Array, v_BNKE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v for each head, [B, N, K, E] in the dtype of q; logits and sums in the accumulator.

    The N x N map is held whole only where it is small. On CPU longer sequences go head by head in chunks of queries,
    which keeps the map in cache and is as fast as PyTorch's kernel; elsewhere in chunks once it would pass
    WHOLE_MAP_BYTES. The gradient makes the map again from the log-sum of each row (FlashAttention, arXiv 2205.14135,
    appendix B), so none is ever kept. Reverse-mode derivatives of first order only.
    """
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return heads_first(_attend(*map(heads_first, (q_BNKE, k_BNKE, v_BNKE))))


@jax.custom_vjp
def _attend(q_BKNE: Array, k_BKNE: Array, v_BKNE: Array) -> Array:
    return _attend_forward(q_BKNE, k_BKNE, v_BKNE)[0]


def _attend_forward(q, k, v):
    o, lse = _by_platform(_chunked_rows, q, k, v)
    return o, (q, k, v, o, lse)


def _attend_backward(residuals, g):
    q, k, v, o, lse = residuals
    acc = lse.dtype
    delta = jnp.einsum('...e,...e->...', o.astype(acc), g.astype(acc))
    return _by_platform(_chunked_gradients, q, k, v, lse, delta, g)


_attend.defvjp(_attend_forward, _attend_backward)


def _by_platform(function, q, *rest):
    """Runs `function(chunk, q, *rest)` over heads-first arrays [B, K, N, ...] in pieces that suit the platform."""
    b, heads, n, _ = q.shape
    pairs_bytes = b * heads * n * n * accumulator(q.dtype).itemsize

    def head_by_head(*args):
        flat = [a.reshape(b * heads, *a.shape[2:]) for a in args]
        outputs = jax.lax.map(lambda head: function(CHUNK, *head), tuple(flat))
        return jax.tree.map(lambda a: a.reshape(b, heads, *a.shape[1:]), outputs)

    def all_heads(*args):
        return function(n if pairs_bytes <= WHOLE_MAP_BYTES else CHUNK, *args)

    if n < CHUNK:
        return all_heads(q, *rest)
    return jax.lax.platform_dependent(q, *rest, cpu=head_by_head, default=all_heads)


def _split_rows(chunk: int, *arrays: Array) -> list[Array]:
    """[..., N, E] -> [chunks, ..., rows, E] with nearly equal chunks, filled up with zeros; [..., N] likewise."""
    n = arrays[0].shape[-2]
    chunks = -(-n // chunk)
    rows = -(-n // chunks)
    axis = arrays[0].ndim - 2

    def split(a):
        a = jnp.pad(a, [(0, chunks * rows - n if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, rows, *a.shape[axis + 1:]), axis, 0)

    return [split(a) for a in arrays]


def _join_rows(a: Array, axis: int, n: int) -> Array:
    """Undoes `_split_rows`: [chunks, ..., rows, (E)] -> [..., N, (E)]; `axis` is that of the rows in the result."""
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2:])
    return jax.lax.slice_in_dim(a, 0, n, axis=axis)


def _chunked_rows(chunk: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Outputs [..., N, E] in the dtype of q, and the log-sum of exponentials of each row of logits [..., N]."""
    n, axis = q.shape[-2], q.ndim - 2
    if chunk >= n:
        return _rows(q, k, v)
    o, lse = jax.lax.map(lambda q: _rows(q, k, v), _split_rows(chunk, q)[0])
    return _join_rows(o, axis, n), _join_rows(lse, axis, n)


def _rows(q, k, v):
    acc, scale = accumulator(q.dtype), q.shape[-1] ** -0.5
    logits = jnp.einsum('...qe,...ne->...qn', q, k, preferred_element_type=acc)
    peak = logits.max(-1, keepdims=True)
    weights = jnp.exp((logits - peak) * scale)
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum('...qn,...ne->...qe', weights.astype(q.dtype), v, preferred_element_type=acc) / total
    return o.astype(q.dtype), (peak * scale + jnp.log(total))[..., 0]


def _chunked_gradients(chunk: int, q, k, v, lse, delta, g) -> tuple[Array, Array, Array]:
    """Cotangents of q, k, v. delta [..., N] = Σ_e o·g; every chunk of queries adds its part to those of k and v."""
    n, axis, acc = q.shape[-2], q.ndim - 2, lse.dtype
    if chunk >= n:
        dq, dk, dv = _row_gradients(q, k, v, lse, delta, g)
    else:
        def add_chunk(totals, rows):
            q, lse, delta, g = rows
            dq, *parts = _row_gradients(q, k, v, lse, delta, g)
            return tuple(t + p for t, p in zip(totals, parts, strict=True)), dq

        zeros = jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc)
        (dk, dv), dq = jax.lax.scan(add_chunk, zeros, _split_rows(chunk, q, lse, delta, g))
        dq = _join_rows(dq, axis, n)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _row_gradients(q, k, v, lse, delta, g):
    einsum = functools.partial(jnp.einsum, preferred_element_type=lse.dtype)
    scale = q.shape[-1] ** -0.5
    weights = jnp.exp(einsum('...qe,...ne->...qn', q, k) * scale - lse[..., None])
    dv = einsum('...qn,...qe->...ne', weights.astype(q.dtype), g)
    dweights = einsum('...qe,...ne->...qn', g, v)
    dlogits = (weights * (dweights - delta[..., None]) * scale).astype(q.dtype)
    return einsum('...qn,...ne->...qe', dlogits, k), einsum('...qn,...qe->...ne', dlogits, q), dv
