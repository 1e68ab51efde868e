"""REPA's loss (arXiv 2410.06940): tokens of a block, projected, learn the features of frozen networks."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array
EPS = 1e-12      # of each norm, as in its code


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
