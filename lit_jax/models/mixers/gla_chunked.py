"""Gated linear attention in chunks: the recurrence over tokens as matrix products, stable for any gate.

For each head, with a state S [E, V] that starts at zero and gates α = exp(g) between 0 and 1,

    S_t = diag(α_t)·S_{t-1} + k_tᵀ·v_t        o_t = q_t·S_t                  (arXiv 2312.06635)

so that o_i = Σ_{j ≤ i} Σ_e q_ie·k_je·D_ije·v_j with the decay D_ij = α_{j+1}·…·α_i.

Where no chunk decays by more than e^-MILD (`lit_jax/models/mixers/gla_mild.py`), as in trained models, D_ij
is the product of the decays up to i and the inverse of those up to j. For gates near 0 that would overflow,
and gates of 1e-30 are allowed. Then every factor is a product of gates, at a few times the cost:

- Within a chunk the pairs i > j are sorted by the highest bit in which i and j differ. For bit s, i lies in
  the right and j in the left half of one block of 2s tokens, and D_ij = (gates of the right half up to
  i)·(gates of the left half after j): one masked matrix product for each bit, and one for the diagonal.
- Between chunks the state is carried: o_i += (q_i·gates of the chunk up to i)·S, then S becomes
  (gates of the chunk)·S + Σ_j (k_j·gates of the chunk after j)ᵀ·v_j.

No gate is divided by, and no large sums are subtracted, in the gradients neither: they keep their relative
precision at the smallest gates. Sums, gates, decays and states are in the accumulator whatever the dtype of
q, k and v; time and memory are linear in the number of tokens.

Axes: G heads of all images, C chunks of a segment, T tokens of a chunk. A segment is one step of a loop:
enough to fill the machine, little enough to stay in its cache."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.layers import Array
from lit_jax.models.mixers import gla_mild
from lit_jax.runtime.dtypes import accumulator


def default_chunk() -> tuple[int, int]:
    """(tokens of a chunk, chunks of a segment): measured on CPU; accelerators need larger matrices."""
    return (16, 16) if jax.default_backend() == 'cpu' else (64, 16)


def chunked_gla(q_BNKE: Array, k_BNKE: Array, v_BNKV: Array, g_BNKE: Array,
                chunk: int = 0) -> tuple[Array, Array]:
    """(o [B, N, K, V], last state [B, K, E, V]) of the recurrence above, in the accumulator of q's dtype.

    g_BNKE: logarithms of the gates, at most 0, in the accumulator. chunk: tokens of a chunk, a power of two;
    0 takes `default_chunk`. N need not be a multiple of it. First derivatives only."""
    b, n, heads, _ = q_BNKE.shape
    tokens, most = default_chunk()
    chunk = min(chunk or tokens, 2 ** math.ceil(math.log2(n)))
    segments = math.ceil(n / chunk / most)
    chunks = math.ceil(n / chunk / segments)
    missing = segments * chunks * chunk - n

    def cut(x):      # -> [segments, B, tokens, K, ...]; padded tokens add nothing and decay nothing
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
        return jnp.moveaxis(x.reshape(b, segments, chunks * chunk, heads, -1), 1, 0)

    g_BNKE = g_BNKE.astype(accumulator(q_BNKE.dtype))
    o, last = _attend(chunk, *map(cut, (q_BNKE, k_BNKE, v_BNKV, g_BNKE)))
    o = jnp.moveaxis(o, 0, 1).reshape(b, n + missing, heads, -1)
    return o[:, :n], last.reshape(b, heads, *last.shape[1:])


def recurrent_gla(q_BNKE: Array, k_BNKE: Array, v_BNKV: Array, g_BNKE: Array,
                  h_BNKV: Array | None = None) -> tuple[Array, Array]:
    """The recurrence token by token: the result of `chunked_gla`, slowly.

    h: logarithms of a second gate β, on the channels of the values: S_t = (α_tᵀβ_t) ⊙ S_{t-1} + k_tᵀ·v_t."""
    acc = accumulator(q_BNKE.dtype)
    h_BNKV = jnp.zeros_like(v_BNKV) if h_BNKV is None else h_BNKV
    tokens = [jnp.moveaxis(x.astype(acc), 1, 0)
              for x in (q_BNKE, k_BNKE, v_BNKV, jnp.exp(g_BNKE), jnp.exp(h_BNKV))]

    def step(state, token):
        q, k, v, alpha, beta = token
        state = alpha[..., None] * beta[..., None, :] * state + k[..., None] * v[..., None, :]
        return state, jnp.einsum('bke,bkev->bkv', q, state)

    (b, _, heads, e), v_dim = q_BNKE.shape, v_BNKV.shape[-1]
    last, o = jax.lax.scan(step, jnp.zeros((b, heads, e, v_dim), acc), tuple(tokens))
    return jnp.moveaxis(o, 0, 1), last


def _attend_forward(chunk, q, k, v, g):
    def run(segment, *inputs):
        def step(state, inputs):
            new_state, o = segment(state, *(_heads_first(x, chunk) for x in inputs))
            return new_state, (_tokens_first(o, inputs[0].shape), state)

        return jax.lax.scan(step, state, inputs)

    _, batch, _, heads, e_dim = q.shape
    state = jnp.zeros((batch * heads, e_dim, v.shape[-1]), g.dtype)
    last, (o, states) = jax.lax.cond(_is_mild(g, chunk), functools.partial(run, gla_mild.segment),
                                     functools.partial(run, _segment), q, k, v, g)
    return (o, last), (q, k, v, g, states)


def _attend_backward(chunk, residuals, cotangents):
    def run(segment, d_last, *inputs):
        def step(d_state, inputs):
            *inputs, d_o, state = inputs
            d_state, gradients = segment(d_state, state, *(_heads_first(x, chunk) for x in (*inputs, d_o)))
            return d_state, tuple(_tokens_first(d, x.shape).astype(x.dtype)
                                  for d, x in zip(gradients, inputs, strict=True))

        return jax.lax.scan(step, d_last, inputs, reverse=True)[1]

    *inputs, states = residuals
    d_o, d_last = cotangents
    return jax.lax.cond(_is_mild(inputs[-1], chunk), functools.partial(run, gla_mild.segment_backward),
                        functools.partial(run, _segment_backward), d_last, *inputs, d_o, states)


def _attend_tangent(chunk, residuals, tangents):
    return jax.jvp(lambda *inputs: _attend_forward(chunk, *inputs)[0], residuals[:4], tangents)[1]


_attend = with_derivatives(_attend_forward, _attend_tangent, _attend_backward, static=1)


def _is_mild(g, chunk):
    """Whether every chunk of every channel keeps at least e^-MILD; g [segments, B, tokens, K, E]."""
    s, b, n, heads, e = g.shape
    return g.reshape(s, b, n // chunk, chunk, heads, e).sum(3).min() >= -gla_mild.MILD


def _heads_first(x, chunk):
    """[B, tokens, K, ...] -> [C, G, T, ...], segment by segment: the transposed arrays never exist whole."""
    b, n, heads, e = x.shape
    x = x.reshape(b, n // chunk, chunk, heads, e).transpose(1, 0, 3, 2, 4)
    return x.reshape(n // chunk, b * heads, chunk, e)


def _tokens_first(x, shape):
    b, n, heads, _ = shape
    c, _, t, e = x.shape
    return x.reshape(c, b, heads, t, e).transpose(1, 0, 3, 2, 4).reshape(b, n, heads, e)


# One segment: arrays [C, G, T, ...], states [G, E, V]


def _segment(state, q, k, v, g):
    dot = gla_mild.dots(v.dtype, g.dtype)
    before, after, levels = _decays(g)
    scores = 0
    for decay, mask in zip((1, *levels), _masks(q.shape[2]), strict=True):
        scores += jnp.where(mask, dot('cgie,cgje->cgij', q * decay, k * decay), 0)
    state, states = gla_mild.carry(state, before[:, :, -1], dot('cgte,cgtv->cgev', k * after, v))
    return state, dot('cgij,cgjv->cgiv', scores, v) + dot('cgte,cgev->cgtv', q * before, states)


def _segment_backward(d_state, state, q, k, v, g, d_o):
    """Values of `_segment` are recomputed."""
    dot = gla_mild.dots(v.dtype, g.dtype)
    before, after, levels = _decays(g)
    whole, q_before, k_after = before[:, :, -1], q * before, k * after
    _, states = gla_mild.carry(state, whole, dot('cgte,cgtv->cgev', k_after, v))
    d_state, d_added = gla_mild.carry(d_state, whole, dot('cgte,cgtv->cgev', q_before, d_o), reverse=True)
    d_q = before * dot('cgtv,cgev->cgte', d_o, states)
    d_k = after * dot('cgtv,cgev->cgte', v, d_added)
    d_whole = (states * d_added).sum(-1) * whole
    d_before = q * d_q + jnp.where(_rows(q.shape[2]) == q.shape[2] - 1, d_whole[:, :, None], 0)
    d_after, d_levels = k * d_k, []
    # Both orders of the same numbers: a product over the first axis of its factor is twice as slow on CPU.
    turned, d_scores, d_turned = 0, dot('cgiv,cgjv->cgij', d_o, v), dot('cgjv,cgiv->cgji', v, d_o)
    for decay, mask in zip((1, *levels), _masks(q.shape[2]), strict=True):
        near_q, near_k = q * decay, k * decay
        turned += jnp.where(mask.T, dot('cgje,cgie->cgji', near_k, near_q), 0)
        more_q = decay * dot('cgij,cgje->cgie', jnp.where(mask, d_scores, 0), near_k)
        more_k = decay * dot('cgji,cgie->cgje', jnp.where(mask.T, d_turned, 0), near_q)
        d_q, d_k = d_q + more_q, d_k + more_k
        d_levels.append(q * more_q + k * more_k)
    d_v = dot('cgji,cgiv->cgjv', turned, d_o) + dot('cgte,cgev->cgtv', k_after, d_added)
    return d_state, (d_q, d_k, d_v, _decays_backward(d_before, d_after, d_levels[1:]))


def _rows(tokens: int) -> np.ndarray:
    return np.arange(tokens)[:, None]


def _bits(tokens: int) -> list[int]:
    return [2 ** bit for bit in range(tokens.bit_length() - 1)]


@functools.cache
def _masks(tokens: int) -> list[np.ndarray]:
    """[T, T] each: the diagonal, then for each bit the pairs i > j whose highest differing bit it is."""
    i, j = _rows(tokens), _rows(tokens).T
    return [i == j, *((i > j) & (i ^ j >= s) & (i ^ j < 2 * s) for s in _bits(tokens))]


def _decays(g):
    """Products of gates [C, G, T, E]: of all up to each token, of all after it, and each bit's factors.

    Halves are joined to blocks of twice the length: the right half takes its earlier gates from the left one,
    the left half its later gates from the right."""
    tokens = g.shape[2]
    before, after, levels = jnp.exp(g), jnp.ones_like(g), []
    for s in _bits(tokens):
        right = _rows(tokens) & s > 0
        levels.append(jnp.where(right, before, after))
        other = _of_the_other_half(_blocks(before, s)[..., -1:, :], s)
        before, after = jnp.where(right, before * other, before), jnp.where(right, after, after * other)
        if s >= 8:       # XLA would compute each of them anew from the gates
            before, after = jax.lax.optimization_barrier((before, after))
    return before, after, levels


def _decays_backward(d_before, d_after, d_levels):
    """The cotangent of g from those of the logarithms of what `_decays` returns."""
    tokens = d_before.shape[2]
    for s, d_level in reversed(list(zip(_bits(tokens), d_levels, strict=True))):
        right, last = _rows(tokens) & s > 0, _rows(tokens) & (s - 1) == s - 1
        sums = _blocks(jnp.where(right, d_before, d_after), s).sum(-2, keepdims=True)
        d_before += jnp.where(right, d_level, 0) + jnp.where(last, _of_the_other_half(sums, s), 0)
        d_after += jnp.where(right, 0, d_level)
    return d_before


def _blocks(x, s):
    return x.reshape(*x.shape[:2], -1, s, x.shape[-1])


def _of_the_other_half(x, s):
    """A value a block of s tokens, [C, G, T/s, 1, E] -> [C, G, T, E]: each token gets its neighbour's."""
    c, g, blocks, _, e = x.shape
    turned = x.reshape(c, g, blocks // 2, 2, 1, e)[:, :, :, ::-1]
    return jnp.broadcast_to(turned, (c, g, blocks // 2, 2, s, e)).reshape(c, g, blocks * s, e)
