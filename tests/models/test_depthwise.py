"""The depth-wise convolution: every form against the definition, finite differences, and each other."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import pulled
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from lit_jax.models.mixers.depthwise import FORMS, depthwise_conv

ALL_FORMS = (None, *FORMS)
compiled = jax.jit(depthwise_conv, static_argnums=3)


def random_arguments(shape, size, dtype=np.float64, seed=0):
    """x [B, H, W, K, E], kernel [k, k, 1, E], bias [E]."""
    rng = np.random.default_rng(seed)
    shapes = shape, (size, size, 1, shape[-1]), shape[-1:]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def by_definition(x, kernel, bias):
    """y[r, c] = bias + Σ_ij kernel[i, j] · x[r + i - k//2, c + j - k//2], nothing outside the grid."""
    (_, h, w, _, _), size = x.shape, kernel.shape[0]
    y = np.zeros(x.shape) + np.asarray(bias)
    for r, c, i, j in np.ndindex(h, w, size, size):
        row, column = r + i - size // 2, c + j - size // 2
        if 0 <= row < h and 0 <= column < w:
            y[:, r, c] += np.asarray(kernel)[i, j, 0] * np.asarray(x)[:, row, column]
    return y


@pytest.mark.parametrize('form', ALL_FORMS)
def test_a_single_weight_shifts_the_image(form):
    x = jnp.arange(6.0).reshape(1, 2, 3, 1, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 1].set(1)          # takes the row above
    got = depthwise_conv(x, kernel, jnp.full(1, 0.5), form)[0, :, :, 0, 0]
    np.testing.assert_array_equal(got, [[0.5, 0.5, 0.5], [0.5, 1.5, 2.5]])


@pytest.mark.parametrize('form', ALL_FORMS)
@given(batch=st.integers(1, 3), rows=st.integers(1, 6), columns=st.integers(1, 6), heads=st.integers(1, 3),
       channels=st.integers(1, 4), size=st.sampled_from([1, 3, 5, 7]), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_every_form_follows_the_definition(form, batch, rows, columns, heads, channels, size, seed):
    with jax.enable_x64(True):
        arguments = random_arguments((batch, rows, columns, heads, channels), size, seed=seed)
        np.testing.assert_allclose(compiled(*arguments, form), by_definition(*arguments), atol=1e-12)


@pytest.mark.parametrize('size', [3, 5])
def test_gradients_of_all_forms_are_equal(size, x64):
    x, *weights = random_arguments((2, 4, 7, 3, 5), size)
    # `channels` is differentiated by XLA's own rule for convolutions: the judge of the hand-written one.
    expected = pulled(lambda *a: depthwise_conv(*a, 'channels'), x, *weights)
    for form in ALL_FORMS:
        jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-11),
                     pulled(lambda *a, form=form: depthwise_conv(*a, form), x, *weights), expected)


@pytest.mark.parametrize('form', ALL_FORMS)
def test_gradients_are_those_of_finite_differences(form, x64):
    arguments = random_arguments((1, 3, 4, 2, 2), 3)
    check_grads(jax.jit(lambda *a: depthwise_conv(*a, form)), arguments, order=1, modes=['rev'], atol=1e-6,
                rtol=1e-6)


@pytest.mark.parametrize('form', ALL_FORMS)
def test_bfloat16_rounds_only_the_result(form):
    arguments = random_arguments((1, 8, 8, 2, 4), 5, jnp.bfloat16)
    got, gradients = pulled(lambda *a: depthwise_conv(*a, form), *arguments)
    assert got.dtype == jnp.bfloat16
    want = by_definition(*(np.asarray(a, np.float64) for a in arguments))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2 ** -8, atol=1e-5)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3


@pytest.mark.parametrize('form', ALL_FORMS)
def test_works_under_vmap_and_scan(form):
    x, kernel, bias = random_arguments((3, 2, 4, 5, 2, 3), 3, np.float32)

    def loss(x, kernel):
        return jnp.square(depthwise_conv(x, kernel, bias, form)).sum()

    gradient = jax.jit(jax.grad(loss, 1))
    one_by_one = [gradient(x[i], kernel) for i in range(3)]
    at_once = jax.jit(jax.vmap(jax.grad(loss, 1), (0, None)))(x, kernel)
    np.testing.assert_allclose(at_once, jnp.stack(one_by_one), rtol=1e-4, atol=1e-4)
    kernels = jnp.stack([kernel, 2 * kernel])
    scanned = jax.lax.scan(lambda x, k: (depthwise_conv(x, k, bias, form), None), x[0], kernels)[0]
    want = compiled(compiled(x[0], kernel, bias, form), 2 * kernel, bias, form)
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-5)


def sharded_program(axes, spec):
    """Compiled text of value and gradients on a mesh, and the largest difference to one device."""
    x, kernel, bias = random_arguments((4, 8, 6, 2, 4), 5, np.float32)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
                         devices=jax.devices()[:int(np.prod(list(axes.values())))])

    def both(x, kernel, bias):
        y, vjp = jax.vjp(depthwise_conv, x, kernel, bias)
        return y, vjp(jnp.sin(y))

    want = jax.jit(both)(x, kernel, bias)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        compiled = jax.jit(both).lower(sharded, kernel, bias).compile()
        got = compiled(sharded, kernel, bias)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return compiled.as_text(), max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


@pytest.mark.skipif(jax.device_count() < 4, reason='needs 4 (virtual) devices')
def test_sharded_rows_exchange_only_their_halo():
    program, difference = sharded_program({'data': 1, 'seq': 4}, PartitionSpec(None, 'seq'))
    assert difference < 1e-4                      # float32, another order of sums
    assert 'all-gather' not in program and 'all-to-all' not in program
    # two each for y, and for the gradients of x and kernel
    assert 2 <= program.count(' collective-permute(') <= 6


@pytest.mark.skipif(jax.device_count() < 4, reason='needs 4 (virtual) devices')
def test_a_sharded_batch_needs_one_sum_of_the_weight_gradient():
    program, difference = sharded_program({'data': 4, 'seq': 1}, PartitionSpec('data'))
    assert difference < 1e-4
    assert not any(op in program for op in ('all-gather', 'all-to-all', 'collective-permute'))
    # None inside the loop over pixels: those of kernel and bias come after it, possibly fused into one.
    assert 1 <= program.count(' all-reduce(') <= 2
