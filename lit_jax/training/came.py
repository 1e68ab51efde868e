"""CAME (Luo et al. 2023, arXiv 2307.02047, algorithm 2), the optimizer of PixArt-Σ: Adam's first moment, a
second one factored in rows and columns, and damping by a factored measure of how far updates are from their
mean.

Leaves are treated as PyTorch's matrices, one per layer of a stack (`lit_jax.training.matrices`). Vectors
(biases, gains) keep a whole second moment and are not damped. Convolutions are matrices (kernel side · input
channels, output channels), depth-wise ones (kernel side, channels); the authors' code factors each k x k
kernel of an OIHW tensor by itself, which saves nothing. Means, and the clipping of an update by its root mean
square, are taken over one layer. There is no bias correction."""
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lit_jax.runtime.leaves import map_named, named_leaves
from lit_jax.training.matrices import MatrixAxes, matrix_axes

Array = jax.Array

BETAS = (0.9, 0.999, 0.9999)    # of the mean, of its square, of the instability
EPS = (1e-30, 1e-16)            # added to squared gradients, to squared instabilities
CLIP_THRESHOLD = 1.0


class CameState(NamedTuple):
    """mu: the mean of updates, shaped as the parameters. nu: for a vector the mean square of its gradients;
    for a matrix a dict, `came_row` [layers, rows], `came_column` [layers, columns] of squared gradients, and
    `came_residual_row`, `came_residual_column` of squared instabilities, with the leaf's axes unflattened."""
    mu: dict
    nu: dict


def scale_by_came(betas: tuple[float, ...] = BETAS, eps: tuple[float, ...] = EPS, clip_threshold: float =
                  CLIP_THRESHOLD, arch: Mapping | None = None) -> optax.GradientTransformation:
    """CAME before the learning rate, with state `CameState`. arch: of the model (`matrix_axes`)."""
    def init(params):
        squares = map_named(lambda path, leaf: _new_squares(leaf, matrix_axes(path, leaf.ndim, arch)), params)
        return CameState(jax.tree.map(jnp.zeros_like, params), squares)

    def update(grads, state, params=None):
        del params
        tree = jax.tree.structure(grads)
        parts = zip(named_leaves(grads).items(), tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu),
                    strict=True)
        done = [_update_leaf(grad, mu, nu, matrix_axes(path, grad.ndim, arch), betas, eps, clip_threshold)
                for (path, grad), mu, nu in parts]
        updates, mu, nu = (tree.unflatten(part) for part in zip(*done, strict=True))
        return updates, CameState(mu, nu)

    return optax.GradientTransformation(init, update)


def _new_squares(leaf: Array, axes: MatrixAxes):
    if not axes.is_matrix:
        return jnp.zeros_like(leaf)

    def zeros(kept):      # each an array of its own: the state is donated
        return jnp.zeros([leaf.shape[axis] for axis in axes.layers + kept], leaf.dtype)

    return {'came_row': zeros(axes.rows), 'came_column': zeros(axes.columns),
            'came_residual_row': zeros(axes.rows), 'came_residual_column': zeros(axes.columns)}


def _update_leaf(grad, mu, nu, axes, betas, eps, clip_threshold):
    """(update, mu, nu) of one leaf."""
    square = jnp.square(grad) + eps[0]
    if axes.is_matrix:
        row, column = _move_means(nu['came_row'], nu['came_column'], square, axes, betas[1])
        update = _divide_by_root(grad, row, column, axes)
    else:
        nu = _move(nu, square, betas[1])
        update = grad * jax.lax.rsqrt(nu)
    rms = jnp.sqrt(jnp.square(update).mean(axes.inner, keepdims=True))
    update = update / jnp.maximum(rms / clip_threshold, 1.0)
    mu = _move(mu, update, betas[0])
    if not axes.is_matrix:
        return mu, mu, nu
    residual = jnp.square(update - mu) + eps[1]
    means = _move_means(nu['came_residual_row'], nu['came_residual_column'], residual, axes, betas[2])
    nu = {'came_row': row, 'came_column': column, 'came_residual_row': means[0],
          'came_residual_column': means[1]}
    return _divide_by_root(mu, *means, axes), mu, nu


def _move(mean: Array, value: Array, beta: float) -> Array:
    return beta * mean + (1 - beta) * value


def _move_means(row: Array, column: Array, square: Array, axes: MatrixAxes,
                beta: float) -> tuple[Array, Array]:
    return _move(row, square.mean(axes.columns), beta), _move(column, square.mean(axes.rows), beta)


def _divide_by_root(x: Array, row: Array, column: Array, axes: MatrixAxes) -> Array:
    """x / √(row·column / mean(row)), the root of the rank-one matrix with these means (Adafactor, eq. 4).
    Factor by factor, x first: a row of zeros has a mean square of 1e-33, whose quotient by the mean of all
    would underflow, and 0 times its root would be NaN."""
    row, column = jnp.expand_dims(row, axes.columns), jnp.expand_dims(column, axes.rows)
    return x * (jax.lax.rsqrt(row) * jnp.sqrt(row.mean(axes.rows, keepdims=True))) * jax.lax.rsqrt(column)
