"""Pieces of the backbone, with values that can be checked by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import made, normal
from flax import nnx
from goldens import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from lit_jax.models import layers
from lit_jax.models.layers import (
    Linear,
    gate,
    layer_norm,
    modulate,
    normal_init,
    patchify,
    position_table,
    timestep_features,
    unpatchify,
    xavier_uniform,
)


def test_timestep_features_put_cosines_first_and_divide_by_half():
    features = timestep_features(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(features[0], np.r_[np.ones(128), np.zeros(128)])
    np.testing.assert_allclose(features[1, 127], np.cos(10000.0 ** (-127 / 128)), rtol=1e-6)
    np.testing.assert_allclose(features[1, 128], np.sin(1.0), rtol=1e-6)


@pytest.mark.parametrize('name', ['dit_a', 'dit_p4', 'lit_model_bias'])
def test_position_table_is_the_official_one(name, goldens):
    meta, _, arrays = weights.load(goldens / f'{name}.npz')
    side = meta['config']['input'] // meta['config']['patch']
    want = arrays['out_pos_embed'].reshape(side * side, -1)
    np.testing.assert_array_equal(position_table((side, side), want.shape[1]), want)


def test_position_table_holds_the_column_first():
    table = position_table((2, 3), 8)
    np.testing.assert_array_equal(table[0, :4], table[3, :4])      # same column, other row
    np.testing.assert_array_equal(table[0, 4:], table[1, 4:])      # same row, other column
    np.testing.assert_allclose(table[2, 0], np.sin(2.0), rtol=1e-6)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), patch=st.integers(1, 4), channels=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_unpatchify_undoes_patchify(rows, columns, patch, channels):
    x = np.random.default_rng(0).normal(size=(2, rows * patch, columns * patch, channels)).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        tokens = patchify(x, patch)
        assert tokens.shape == (2, rows * columns, patch, patch, channels)
        return unpatchify(tokens.reshape(2, rows * columns, -1), (rows, columns), patch)

    np.testing.assert_array_equal(there_and_back(x), x)


def test_patches_are_rows_first():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(patchify(x, 2)[0, 1, :, :, 0], [[2, 3], [6, 7]])


def test_linear_contracts_its_input_axes():
    layer = made(lambda: Linear((2, 3), (4, 5), rngs=nnx.Rngs(0)))
    x = normal(0, (7, 2, 3))
    want = jnp.einsum('bij,ijkl->bkl', x, layer.kernel[...]) + layer.bias[...]
    np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('out_shape, bound', [((32,), np.sqrt(6 / 64)), ((3, 4, 8), np.sqrt(6 / 128))])
def test_xavier_bound_counts_the_whole_matrix(out_shape, bound):
    kernel = np.abs(xavier_uniform(jax.random.key(0), (32,), out_shape))
    assert 0.95 * bound < kernel.max() <= bound


def test_normal_init_has_its_standard_deviation():
    assert np.std(normal_init(0.02)(jax.random.key(0), (256,), (128,))) == pytest.approx(0.02, rel=0.02)


def test_layer_norm_of_two_values():
    normed, inverse = layer_norm(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(normed, [-1, 1], rtol=1e-5)
    np.testing.assert_allclose(inverse, [1.0], rtol=1e-5)


def test_modulate_scales_by_one_plus_scale():
    x = jnp.array([[[1.0, 3.0]]])
    np.testing.assert_allclose(modulate(x, jnp.full((1, 2), 0.5), jnp.ones((1, 2))), [[[-1.5, 2.5]]],
                               rtol=1e-5)


@pytest.mark.parametrize('function, shapes', [
    (modulate, [(2, 5, 6), (2, 6), (2, 6)]), (gate, [(2, 5, 6), (2, 6)])])
def test_written_out_derivatives_equal_finite_differences(function, shapes, x64):
    arguments = [normal(i, shape, jnp.float64) for i, shape in enumerate(shapes)]
    check_grads(jax.jit(function), arguments, order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('function, shapes', [
    (modulate, [(2, 5, 6), (2, 6), (2, 6)]), (gate, [(2, 5, 6), (2, 6)])])
def test_bfloat16_gradients_keep_their_dtype(function, shapes):
    arguments = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    output, pullback = jax.vjp(function, *arguments)
    assert output.dtype == jnp.bfloat16
    assert [g.dtype for g in pullback(output)] == [jnp.bfloat16] * len(shapes)


def test_gradients_of_kernels_can_stay_in_float32():
    layer = Linear(4, (2, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = normal(0, (64, 4), jnp.bfloat16)

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(x).astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss))(params)['kernel'][...]
    with layers.wide_gradients():
        wide = jax.jit(jax.grad(loss))(params)['kernel'][...]      # not the same trace
    assert wide.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(wide, gradient, rtol=1e-2, atol=0.1)
    assert (gradient.astype(jnp.bfloat16) == gradient).all() and not (wide.astype(jnp.bfloat16) == wide).all()
