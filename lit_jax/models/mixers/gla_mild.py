"""One segment of gated linear attention with mild gates: no chunk decays a channel by more than e^-MILD.

With b the sum of the logarithms of the gates of a chunk up to a token, the decay between two tokens is
e^(b_i)·e^(-b_j), and all pairs of a chunk are one matrix product. e^MILD is far inside float32, and rounding
b costs some 1e-6 of a decay. `gla_chunked` has the general form. Arrays [C, G, T, ...] of C chunks, G heads
of all images, T tokens; states [G, E, V]."""
import jax
import jax.numpy as jnp

MILD = 20.0


def segment(state, q, k, v, g):
    """(state after the segment, o)."""
    dot = dots(v.dtype, g.dtype)
    before, inverse, after = _decays(g)
    q_before = q * before
    scores = _causal(dot('cgie,cgje->cgij', q_before, k * inverse))
    state, states = carry(state, before[:, :, -1], dot('cgte,cgtv->cgev', k * after, v))
    return state, dot('cgij,cgjv->cgiv', scores, v) + dot('cgte,cgev->cgtv', q_before, states)


def segment_backward(d_state, state, q, k, v, g, d_o):
    """(cotangent of the state before the segment, those of q, k, v, g); `segment`'s values are recomputed.
    Every decay is an exponential, so the cotangent of b is (q·its cotangent) - (k·its cotangent), and that of
    g the sum of those of b from its token to the end of the chunk."""
    dot = dots(v.dtype, g.dtype)
    before, inverse, after = _decays(g)
    q_before, k_inverse, k_after, whole = q * before, k * inverse, k * after, before[:, :, -1]
    _, states = carry(state, whole, dot('cgte,cgtv->cgev', k_after, v))
    d_state, d_added = carry(d_state, whole, dot('cgte,cgtv->cgev', q_before, d_o), reverse=True)
    d_k_after = after * dot('cgtv,cgev->cgte', v, d_added)
    scores = _causal(dot('cgie,cgje->cgij', q_before, k_inverse))
    d_scores = _causal(dot('cgiv,cgjv->cgij', d_o, v))
    d_q = before * (dot('cgtv,cgev->cgte', d_o, states) + dot('cgij,cgje->cgie', d_scores, k_inverse))
    d_k = d_k_after + inverse * dot('cgij,cgie->cgje', d_scores, q_before)
    d_v = dot('cgij,cgiv->cgjv', scores, d_o) + dot('cgte,cgev->cgtv', k_after, d_added)
    d_b = q * d_q - k * d_k
    d_whole = (states * d_added).sum(-1) * whole + (k * d_k_after).sum(2)
    d_g = jnp.einsum('ts,cgte->cgse', _tri(g), d_b, precision='highest') + d_whole[:, :, None]
    return d_state, (d_q, d_k, d_v, d_g)


def _decays(g):
    """The decays of the chunk up to each token, their inverses, and those after each token."""
    b = jnp.einsum('ts,cgse->cgte', _tri(g), g, precision='highest')      # cumsum is slow on XLA:CPU
    return jnp.exp(b), jnp.exp(-b), jnp.exp(b[:, :, -1:] - b)


def _tri(g):
    return jnp.tri(g.shape[2], dtype=g.dtype)


def _causal(scores):
    return jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, 0)


def dots(dtype, acc):
    """einsum whose operands are rounded to `dtype` and whose sums are taken in `acc`."""
    def dot(spec, a, b):
        return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=acc)
    return dot


def carry(state, whole_CGE, added_CGEV, reverse=False):
    """(last state, states [C, G, E, V] before each chunk) of state ← whole·state + added; or backwards."""
    def step(state, chunk):
        whole, added = chunk
        return whole[..., None] * state + added, state

    return jax.lax.scan(step, state, (whole_CGE, added_CGEV), reverse=reverse)
