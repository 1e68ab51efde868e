"""Softmax attention that keeps no map of all pairs of tokens, in the platform's fastest form.

- plain XLA in chunks of queries, anywhere. On CPU head by head, which keeps the map in cache and is as fast
  as PyTorch's kernel; elsewhere all heads at once, in chunks only where the map would exceed WHOLE_MAP_BYTES.
- cuDNN's fused attention on NVIDIA GPUs in 16 bit, through `jax.nn.dot_product_attention`.
- jax's splash attention kernel on TPUs, for sequences where the map costs more than starting the kernel.

Forward passes return the log-sum of exponentials of each row as well; gradients recompute the map from it
(FlashAttention, arXiv 2205.14135, appendix B). All arrays have the heads first: [B, K, N, E]."""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.layers import Array
from lit_jax.runtime.dtypes import accumulator

CHUNK = 256                   # queries at once where the map of all pairs is not held whole
WHOLE_MAP_BYTES = 2 ** 30     # largest map held whole on accelerators, for all heads and images of a device
SPLASH_TOKENS = 1024          # from here on TPUs use the kernel
SPLASH_BLOCK = 128            # its blocks are multiples of this


def fused_attention(q_BKNE: Array, k_BKNE: Array, v_BKNE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v in the dtype of q, of any number of queries. First derivatives only."""
    return _attend(q_BKNE, k_BKNE, v_BKNE)


def _attend_forward(q, k, v):
    o, lse = _by_platform(0, q, k, v)
    return o, (q, k, v, o, lse)


def _attend_backward(residuals, g):
    return _by_platform(1, *residuals, g)


def _attend_tangent(residuals, tangents):
    q = residuals[0]
    if q.shape[-2] < CHUNK:
        return _PLAIN_TANGENT['whole'](*residuals, *tangents)
    return jax.lax.platform_dependent(*residuals, *tangents, cpu=_PLAIN_TANGENT['heads'],
                                      default=_PLAIN_TANGENT['whole'])


_attend = with_derivatives(_attend_forward, _attend_tangent, _attend_backward)


def _by_platform(direction: int, q: Array, k: Array, *rest: Array):
    """The forward (0) or backward (1) pass of the form for the platform that the program is lowered for."""
    if q.shape[-2] < CHUNK:
        return FORMS['whole'][direction](q, k, *rest)
    forms = {'cpu': 'heads', 'default': 'whole'}
    if _cudnn_takes(q):
        forms['cuda'] = 'cudnn'
    if _splash_takes(q, k):
        forms['tpu'] = 'splash'
    return jax.lax.platform_dependent(q, k, *rest,
                                      **{name: FORMS[form][direction] for name, form in forms.items()})


def _cudnn_takes(q: Array) -> bool:
    """cuDNN's limits for training; it can only be traced where a GPU is."""
    return (jax.default_backend() == 'gpu' and q.dtype in (jnp.bfloat16, jnp.float16)
            and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128)


def _cudnn(q, k, v):
    tokens_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    o, lse = jax.nn.dot_product_attention(*tokens_first, implementation='cudnn', return_residual=True)
    return jnp.swapaxes(o, 1, 2), jnp.swapaxes(lse, 1, 2)


def _cudnn_backward(q, k, v, o, lse, g):
    # Its gradient wants its own residuals; the forward pass that makes them again is a quarter of the work.
    def attend(q, k, v):
        tokens_first = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        return jnp.swapaxes(jax.nn.dot_product_attention(*tokens_first, implementation='cudnn'), 1, 2)

    return jax.vjp(attend, q, k, v)[1](g)


def _splash_takes(q: Array, k: Array) -> bool:
    n_q, n_k = q.shape[-2], k.shape[-2]
    return q.dtype == jnp.bfloat16 and n_k >= SPLASH_TOKENS and n_q % SPLASH_BLOCK == n_k % SPLASH_BLOCK == 0


def _splash(q, k, v, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # 0.3 s that only TPUs need
    (heads, n_q), n_k = q.shape[1:3], k.shape[2]
    block = max(size for size in (128, 256, 512) if n_q % size == n_k % size == 0)
    mask = splash.MultiHeadMask([splash.FullMask((n_q, n_k))] * heads)
    blocks = splash.BlockSizes(block_q=block, block_kv=block)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, save_residuals=True,
                                    interpret=interpret, block_sizes=blocks)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    o, (lse,) = jax.vmap(kernel)(scaled, k, v)
    return o, lse


def _all_heads(function, q, k, *rest):
    pairs_bytes = q[..., 0].size * k.shape[-2] * accumulator(q.dtype).itemsize
    unknown = not isinstance(pairs_bytes, int)      # exported for any batch
    return function(q.shape[-2] if unknown or pairs_bytes <= WHOLE_MAP_BYTES else CHUNK, q, k, *rest)


def _head_by_head(function, *args):
    b, heads = args[0].shape[:2]
    flat = [a.reshape(b * heads, *a.shape[2:]) for a in args]
    outputs = jax.lax.map(lambda head: function(CHUNK, *head), tuple(flat))
    return jax.tree.map(lambda a: a.reshape(b, heads, *a.shape[1:]), outputs)


def _split_rows(chunk: int, *arrays: Array) -> list[Array]:
    """[..., N, E] -> [chunks, ..., rows, E], nearly equal, filled up with zeros; [..., N] likewise."""
    n, axis = arrays[0].shape[-2], arrays[0].ndim - 2
    chunks = -(-n // chunk)
    rows = -(-n // chunks)

    def split(a):
        a = jnp.pad(a, [(0, chunks * rows - n if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, rows, *a.shape[axis + 1:]), axis, 0)

    return [split(a) for a in arrays]


def _join_rows(a: Array, axis: int, n: int) -> Array:
    """Undoes `_split_rows`: [chunks, ..., rows, (E)] -> [..., N, (E)]; `axis`: of the rows in the result."""
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2:])
    return jax.lax.slice_in_dim(a, 0, n, axis=axis)


def _chunked_rows(chunk: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Outputs [..., N, E] in the dtype of q, and the log-sum-exp of each row of logits [..., N]."""
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


def _chunked_gradients(chunk: int, q, k, v, o, lse, g) -> tuple[Array, Array, Array]:
    """Cotangents of q, k, v from outputs, log-sums and that of o; chunks of queries add to k's and v's."""
    n, axis, acc = q.shape[-2], q.ndim - 2, lse.dtype
    delta = jnp.einsum('...e,...e->...', o.astype(acc), g.astype(acc))
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


def _chunked_tangents(chunk: int, q, k, v, o, lse, dq, dk, dv) -> Array:
    """The tangent of the outputs."""
    n, axis = q.shape[-2], q.ndim - 2
    if chunk >= n:
        return _row_tangents(k, v, dk, dv, q, o, lse, dq)
    rows = jax.lax.map(lambda rows: _row_tangents(k, v, dk, dv, *rows), _split_rows(chunk, q, o, lse, dq))
    return _join_rows(rows, axis, n)


def _row_tangents(k, v, dk, dv, q, o, lse, dq):
    einsum = functools.partial(jnp.einsum, preferred_element_type=lse.dtype)
    scale = q.shape[-1] ** -0.5
    weights = jnp.exp(einsum('...qe,...ne->...qn', q, k) * scale - lse[..., None])
    slopes = weights * (einsum('...qe,...ne->...qn', dq, k) + einsum('...qe,...ne->...qn', q, dk)) * scale
    do = einsum('...qn,...ne->...qe', slopes.astype(q.dtype), v) - o * slopes.sum(-1, keepdims=True)
    return (do + einsum('...qn,...ne->...qe', weights.astype(q.dtype), dv)).astype(q.dtype)


_PLAIN_TANGENT = {'whole': functools.partial(_all_heads, _chunked_tangents),
                  'heads': functools.partial(_head_by_head, _chunked_tangents)}
_PLAIN_BACKWARD = {'whole': functools.partial(_all_heads, _chunked_gradients),
                   'heads': functools.partial(_head_by_head, _chunked_gradients)}

# name -> (forward(q, k, v) -> (o, lse [B, K, N]), backward(q, k, v, o, lse, g) -> cotangents of q, k, v)
FORMS: dict[str, Any] = {
    'whole': (functools.partial(_all_heads, _chunked_rows), _PLAIN_BACKWARD['whole']),
    'heads': (functools.partial(_head_by_head, _chunked_rows), _PLAIN_BACKWARD['heads']),
    'cudnn': (_cudnn, _cudnn_backward),
    'splash': (_splash, _PLAIN_BACKWARD['whole'])}      # teachers, its users, need no gradient
