"""Alignment (Grafting, arXiv 2506.05340, stage 1): each mixer learns what the teacher's attention returns.

For every block the student's mixer sees what enters the teacher's attention (after norm and modulation) and
is compared with what that attention returns (after its output projection, before the gate).

And REPA's (arXiv 2410.06940): tokens of a block, projected, learn the features of frozen networks."""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array
EPS = 1e-12      # of a norm, as in REPA's code

# Of a difference; one mean over everything follows. Huber: quadratic up to `delta`, then linear.
LOSSES: dict[str, Callable[[Array, float], Array]] = {
    'mse': lambda d, delta: jnp.square(d),
    'l1': lambda d, delta: jnp.abs(d),
    'huber': lambda d, delta: jnp.where(jnp.abs(d) <= delta, 0.5 * jnp.square(d),
                                        delta * (jnp.abs(d) - 0.5 * delta)),
}


def alignment_loss(output: Array, target: Array, loss: str = 'mse', delta: float = 1.0) -> Array:
    """The mean of a loss of LOSSES over output - target, any equal shapes; float32 or wider."""
    acc = accumulator(output.dtype)
    return LOSSES[loss](output.astype(acc) - target.astype(acc), delta).mean()


def relative_alignment_loss(output: Array, target: Array, loss: str = 'mse', delta: float = 1.0) -> Array:
    """`alignment_loss` in units of the target's standard deviation over batch, tokens and channels, so that
    all blocks count alike: 'mse' is the squared error over the variance, 1 for the best constant."""
    acc = accumulator(output.dtype)
    scale = jax.lax.rsqrt(jnp.maximum(target.astype(acc).var(), jnp.finfo(acc).tiny))
    return alignment_loss(output.astype(acc) * scale, target.astype(acc) * scale, loss, delta)


def block_losses(outputs: Array, targets: Array) -> Array:
    """[B], float32 or wider: squared differences of what blocks of student and teacher return, each block's
    over the variance of its target (over batch, tokens and channels); the mean over blocks, tokens and
    channels. outputs, targets: [depth, B, N, D]; targets get no gradient."""
    acc = accumulator(outputs, targets)
    targets = jax.lax.stop_gradient(targets).astype(acc)
    variance = jnp.maximum(targets.var(axis=(1, 2, 3), keepdims=True), jnp.finfo(acc).tiny)
    return (jnp.square(outputs.astype(acc) - targets) / variance).mean(axis=(0, 2, 3))


def projection_loss(projected: Sequence[Array], features: Sequence[Array]) -> Array:
    """[B], float32 or wider: minus the cosine between each projected token and its feature, the mean over
    tokens and networks. projected, features: [B, N, C] of each network; features get no gradient."""
    shapes = [list(array.shape) for array in projected], [list(array.shape) for array in features]
    if shapes[0] != shapes[1]:
        raise UserError(f'the projectors give {shapes[0]}, the network of train.features {shapes[1]} '
                        f'(images, tokens, channels): model.projectors.features are the channels, and it '
                        f'must have the tokens of the model')
    cosines = [_normalised(z) * _normalised(jax.lax.stop_gradient(f))
               for z, f in zip(projected, features, strict=True)]
    return -jnp.stack([cosine.sum(-1).mean(-1) for cosine in cosines]).mean(0)


def _normalised(x: Array) -> Array:
    x = x.astype(accumulator(x))
    # At least EPS as PyTorch's, with a gradient at 0.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), EPS ** 2))
