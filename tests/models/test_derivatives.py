"""Derivatives written out by hand: both modes, with vmap, scan and remat, and no second ones."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.layers import gate, modulate
from lit_jax.runtime.errors import UserError


def forward(power, x, y, index):
    return (x ** power * y, y[index]), (x, y, index)


def tangent(power, residuals, tangents):
    (x, y, index), (dx, dy, _) = residuals, tangents
    return power * x ** (power - 1) * y * dx + x ** power * dy, dy[index]


def backward(power, residuals, cotangent):
    (x, y, index), (g, h) = residuals, cotangent
    return power * x ** (power - 1) * y * g, (x ** power * g).at[index].add(h), None


ours = with_derivatives(forward, tangent, backward, static=1)
X, Y, I = np.array([1., 2, 3], np.float32), np.array([.5, -1, 4], np.float32), np.int32(1)


def plain(power, x, y, index):
    return forward(power, x, y, index)[0]


def scalar(function, x, y):
    a, b = function(3, x, y, I)
    return (a * jnp.arange(3.)).sum() + b * b


def test_both_modes_of_some_arguments_or_all():
    def derivatives(f):
        return jax.jit(lambda x, y: [mode(lambda x, y: scalar(f, x, y), wrt)(x, y) for wrt in (0, 1, (0, 1))
                                     for mode in (jax.grad, jax.jacfwd)])(X, Y)

    jax.tree.map(np.testing.assert_allclose, derivatives(ours), derivatives(plain))


def test_in_loops_and_batches_and_with_remat():
    def looped(f, x, y):
        body = jax.checkpoint(lambda y, x: (f(2, x, y, I)[0], None))
        return jax.lax.scan(body, y, x)[0].sum()

    xs, ys = normal(0, (2, 4, 3)), normal(1, (2, 3))
    got, want = (jax.jit(jax.vmap(jax.grad(lambda x, y, f=f: looped(f, x, y), (0, 1))))(xs, ys)
                 for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize('function, arrays', [
    (modulate, ((2, 5, 4), (2, 4), (2, 4))), (gate, ((2, 5, 4), (2, 4)))], ids=['modulate', 'gate'])
def test_layers_have_both_modes(function, arrays, x64):
    point, direction = ([normal(seed + i, shape) for i, shape in enumerate(arrays)] for seed in (0, 9))

    @jax.jit
    def derivatives(point, direction):
        value, forward = jax.jvp(function, point, direction)
        moved = [function(*(a + step * b for a, b in zip(point, direction, strict=True)))
                 for step in (1e-5, -1e-5)]
        pulled = jax.vjp(function, *point)[1](jnp.sin(value))
        return (forward, (moved[0] - moved[1]) / 2e-5, jnp.vdot(jnp.sin(value), forward),
                sum(jnp.vdot(a, b) for a, b in zip(pulled, direction, strict=True)))

    forward, difference, one, other = derivatives(point, direction)
    np.testing.assert_allclose(forward, difference, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(one, other)


def test_second_derivatives_are_refused_instead_of_wrong():
    with pytest.raises(UserError, match='second derivatives'):
        jax.hessian(lambda x: scalar(ours, x, Y))(X)
