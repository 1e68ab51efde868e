"""The forms of fused attention against each other, on a mesh as on one device."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.models.mixers import fused
from lit_jax.models.mixers.softmax import dot_product_attention
from lit_jax.training.mesh import make_mesh


def textbook(q, k, v):
    """The whole map, heads first: [B, K, N, E]."""
    weights = jax.nn.softmax(jnp.einsum('bkqe,bkne->bkqn', q, k) / np.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum('bkqn,bkne->bkqe', weights, v)


def random_qkv(q_shape, keys, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (q_shape, *[(*q_shape[:2], keys, q_shape[3])] * 2)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@given(batch=st.integers(1, 2), tokens=st.integers(1, 20), heads=st.integers(1, 3),
       channels=st.integers(1, 5), chunk=st.integers(1, 24), seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_any_chunk_of_queries_gives_the_same(batch, tokens, heads, channels, chunk, seed):
    with jax.enable_x64(True):
        q, k, v = random_qkv((batch, heads, tokens, channels), tokens, seed=seed)
        g = jnp.cos(q)

        @functools.partial(jax.jit, static_argnums=0)
        def run(chunk, q, k, v, g):
            o, lse = fused._chunked_rows(chunk, q, k, v)
            return o, lse, *fused._chunked_gradients(chunk, q, k, v, o, lse, g)

        for got, want in zip(run(chunk, q, k, v, g), run(tokens, q, k, v, g), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_map_over_the_limit_is_never_whole_on_an_accelerator(monkeypatch, x64):
    monkeypatch.setattr(fused, 'WHOLE_MAP_BYTES', 1)
    monkeypatch.setattr(fused, 'CHUNK', 4)
    q, k, v = random_qkv((1, 2, 10, 3), 10)
    # Takes the branch for other platforms, on this one.
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **others: default(*args))
    np.testing.assert_allclose(fused.fused_attention(q, k, v), textbook(q, k, v), atol=1e-12)
    shapes = str(jax.make_jaxpr(jax.grad(lambda q: fused.fused_attention(q, k, v).sum()))(q))
    assert '10,10]' not in shapes


FORMS = [('whole', np.float32, 2e-6), ('heads', np.float32, 2e-6), ('splash', jnp.bfloat16, 2e-2)]
if jax.default_backend() == 'gpu':
    FORMS.append(('cudnn', jnp.bfloat16, 2e-2))


@pytest.mark.parametrize('queries', [256, 128], ids=['all queries', 'half of them'])
@pytest.mark.parametrize('form, dtype, tolerance', FORMS, ids=[form for form, *_ in FORMS])
def test_all_forms_agree(form, dtype, tolerance, queries):
    """Outputs, log-sums and gradients; in bfloat16 within its rounding of the weights (eps 2^-8)."""
    q, k, v = random_qkv((2, 2, queries, 72), 256, dtype)
    g = jnp.sin(q)
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    forward, backward = fused.FORMS[form]
    if form == 'splash':
        # the TPU's kernel in jax's interpreter of it
        forward = functools.partial(forward, interpret=True)
    o, lse = jax.jit(forward)(q, k, v)
    gradients = jax.jit(backward)(q, k, v, o, lse, g)
    want, want_gradients = jax.jit(lambda g, *qkv: (textbook(*qkv), jax.vjp(textbook, *qkv)[1](g)))(
        g.astype(jnp.float32), *wide)
    logits = jnp.einsum('bkqe,bkne->bkqn', *wide[:2]) / np.sqrt(72)
    assert o.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(o.astype(np.float32), want, atol=tolerance)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), rtol=max(tolerance / 4, 1e-6))
    for got, expected in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got.astype(np.float32), expected,
                                   atol=2 * tolerance * float(np.abs(expected).max()))


def test_platforms_get_their_forms(monkeypatch):
    seen = {}
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda q, *rest, **forms: seen.update(forms)
                        or jnp.zeros_like(q))
    names = {id(form): name for name, pair in fused.FORMS.items() for form in pair}

    def forms(tokens, dtype):
        seen.clear()
        fused._by_platform(0, *random_qkv((1, 1, tokens, 8), tokens, dtype))
        return {platform: names[id(form)] for platform, form in seen.items()}

    assert forms(256, jnp.bfloat16) == {'cpu': 'heads', 'default': 'whole'}
    assert forms(1024, jnp.bfloat16) == {'cpu': 'heads', 'default': 'whole', 'tpu': 'splash'}
    assert 'tpu' not in forms(1024, jnp.float32) and 'tpu' not in forms(1100, jnp.bfloat16)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert forms(256, jnp.bfloat16)['cuda'] == 'cudnn' and 'cuda' not in forms(256, jnp.float32)


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)], ids=str)
def test_a_mesh_changes_nothing(sizes):
    """Values and gradients on eight devices are those on one, to the order of sums in float32."""
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    qkv = [jnp.swapaxes(a, 1, 2) for a in random_qkv((8, 2, 264, 8), 264, np.float32)]

    def run(*qkv):
        o, pull = jax.vjp(dot_product_attention, *qkv)
        return o, pull(jnp.sin(o))

    want = jax.jit(run)(*qkv)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)
