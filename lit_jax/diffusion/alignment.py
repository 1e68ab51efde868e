"""Alignment (Grafting, arXiv 2506.05340, stage 1): each mixer learns what the teacher's attention returns.

For every block the student's mixer sees what enters the teacher's attention (after norm and modulation) and
is compared with what that attention returns (after its output projection, before the gate)."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator

Array = jax.Array

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
