"""The networks of the blocks: their common contract, and the Mix-FFN by hand. Parity with Sana:
test_mixers_sana.py."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import applied, made, normal
from flax import nnx

from lit_jax.models.ffn import FFNS
from lit_jax.runtime.errors import UserError

WIDTH, GRID = 12, (3, 4)


def build(name, dtype=jnp.float32, ratio=2.5):
    return made(lambda: FFNS[name](WIDTH, ratio, dtype=dtype, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name', FFNS)
def test_tokens_in_and_tokens_out(name, dtype):
    x = jax.ShapeDtypeStruct((2, 12, WIDTH), dtype)
    y = jax.eval_shape(lambda x: build(name, dtype)(x, GRID), x)
    assert y.shape == x.shape and y.dtype == dtype


@pytest.mark.parametrize('name', FFNS)
def test_bfloat16_is_close_to_float32(name):
    x = normal(0, (2, 12, WIDTH)).astype(jnp.bfloat16)
    want, got = (jax.jit(lambda x, dtype=dtype: build(name, dtype)(x, GRID))(x.astype(dtype))
                 for dtype in (jnp.float32, jnp.bfloat16))
    error = np.asarray(got, np.float32) - want
    assert np.linalg.norm(error) / np.linalg.norm(want) < 2e-2


@pytest.mark.parametrize('name', FFNS)
def test_the_hidden_width_is_that_of_a_kernel(name):
    """`tensor` cuts what `hidden_width` says; some kernel must have such an axis."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(build(name)))]
    assert any(FFNS[name].hidden_width(WIDTH, 2.5) in shape for shape in shapes)


def test_mix_ffn_sees_eight_neighbours_and_no_more():
    ffn, x = build('mix'), jnp.zeros((1, 35, WIDTH))
    changed = applied(ffn, x.at[0, 3 * 7 + 2].set(1.0), (5, 7)) != applied(ffn, x, (5, 7))
    near = np.zeros((5, 7), bool)
    near[2:5, 1:4] = True
    np.testing.assert_array_equal(changed[0].any(-1).reshape(5, 7), near)


def test_mix_ffn_multiplies_the_first_part_with_the_gate_of_the_second():
    """With a convolution that is the identity on the value and zero on the gate, whose bias then is the
    gate."""
    ffn = build('mix')
    hidden = FFNS['mix'].hidden_width(WIDTH, 2.5)
    kernel = jnp.zeros((3, 3, 2, hidden)).at[1, 1, 0].set(1.0)
    ffn.depth.kernel[...], ffn.depth.bias[...] = kernel, jnp.stack([jnp.zeros(hidden), jnp.full(hidden, 2.0)])
    x = normal(0, (2, 12, WIDTH))
    value = jax.nn.silu(x @ ffn.inverted.kernel[:, 0] + ffn.inverted.bias[0])
    np.testing.assert_allclose(applied(ffn, x, GRID), (value * jax.nn.silu(2.0)) @ ffn.point.kernel[...],
                               atol=1e-5)


def test_mix_ffn_begins_as_pytorch_convolutions_do():
    params = nnx.to_pure_dict(nnx.state(FFNS['mix'](64, 2.5, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    bounds = {('inverted', 'kernel'): 1 / 8, ('inverted', 'bias'): 1 / 8, ('depth', 'kernel'): 1 / 3,
              ('depth', 'bias'): 1 / 3, ('point', 'kernel'): 160 ** -0.5}
    assert {(part, leaf) for part in params for leaf in params[part]} == set(bounds)
    for (part, leaf), bound in bounds.items():
        assert 0.95 * bound < np.abs(params[part][leaf]).max() <= bound


def test_tokens_must_fill_the_grid():
    with pytest.raises(UserError, match='12 tokens do not fill a grid of 3 x 5'):
        build('mix')(jnp.zeros((1, 12, WIDTH)), (3, 5))
