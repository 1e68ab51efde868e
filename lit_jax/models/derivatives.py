"""Derivatives written out by hand, in both modes: `jax.jvp` and `jax.grad`.

JAX lets a function have a forward rule of its own, whose transposition is then automatic, or a backward rule,
which shuts forward mode out. Here a function has both: its forward rule is a linear map of the tangents that
is transposed by hand. JAX transposes by hand what solves a linear system, and u, y -> u, y + T·u solves one:
it is the inverse of u, y -> u, y - T·u. With y = 0 that is the map T, with vmap, scan and remat for free."""
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lit_jax.runtime.errors import UserError

Array = jax.Array


def with_derivatives(forward: Callable, tangent: Callable, backward: Callable, *,
                     plain: Callable | None = None, static: int = 0) -> Callable:
    """A function of arrays with first derivatives in both modes; the first `static` arguments are settings.

    Args:
        forward: (*settings, *arrays) -> (output, residuals); the output is an array or a tuple of them.
        tangent: (*settings, residuals, tangents) -> the output's tangent. Tangents of integers are None.
        backward: (*settings, residuals, cotangent) -> cotangents of the arrays, None for integers.
        plain: (*settings, *arrays) -> output, where nothing is differentiated; None: that of `forward`."""
    @functools.partial(jax.custom_jvp, nondiff_argnums=tuple(range(static)))
    @functools.wraps(forward)
    def call(*args):
        return plain(*args) if plain else forward(*args)[0]

    def rule(*args):
        *settings, primals, tangents = args
        output, residuals = forward(*settings, *primals)
        active = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)
                  and jnp.issubdtype(primals[i].dtype, jnp.inexact)]
        zero = jax.tree.map(jnp.zeros_like, output)
        if not active:
            return output, zero
        once = _once(jnp.concatenate([_empty(r) for r in jax.tree.leaves(residuals)]))

        def apply(given):
            given = dict(zip(active, given, strict=True))
            whole = [None if not jnp.issubdtype(p.dtype, jnp.inexact) else given.get(i, jnp.zeros_like(p))
                     for i, p in enumerate(primals)]
            return tangent(*settings, residuals, tuple(whole))

        def transpose(cotangent):
            cotangents = backward(*settings, residuals, cotangent)
            return [cotangents[i] for i in active]

        return output, _linear([tangents[i] for i in active], zero, once, apply, transpose)

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _linear(inputs: Sequence[Array], zero, once: Array, apply: Callable, transpose: Callable):
    """apply(inputs), like `zero`, with this transpose. once: no elements, but the residuals' derivatives."""
    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def solve(_, right):
        u, y = right
        return u, add(y, apply(u))

    def transpose_solve(_, right):
        u, y = right
        return add(u, transpose(y)), y

    # Made from the inputs, of which all of the right side must be a function for JAX to transpose it.
    nothing = jnp.concatenate([_empty(inputs[0]), once])
    y = jax.tree.map(lambda like: jax.lax.pad(nothing.astype(like.dtype), jnp.zeros((), like.dtype),
                                              [(0, like.size, 0)]).reshape(like.shape), zero)
    return jax.lax.custom_linear_solve(lambda x: x, (list(inputs), y), solve, transpose_solve)[1]


def _empty(x: Array) -> Array:
    """None of the elements of x, but a function of it."""
    return jax.lax.slice_in_dim(x.reshape(x.shape or (1,)), 0, 0).reshape(0).astype(jnp.float32)


@jax.custom_jvp
def _once(x: Array) -> Array:
    return x


@_once.defjvp
def _refuse(primals, tangents):
    # The residuals have derivatives. The rules are not differentiated themselves: terms would be left out.
    raise UserError('second derivatives of a layer whose first ones are written out: not supported; take '
                    'differences of first ones')
