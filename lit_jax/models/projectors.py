"""REPA's projectors (arXiv 2410.06940): from the tokens of one block to the features of other networks."""
from collections.abc import Mapping, Sequence

import jax
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.runtime.errors import UserError, shown

FIELDS = 'block', 'width', 'features'


class Projector(nnx.Module):
    """Three linear maps with SiLU between them: [B, N, D] -> [B, N, features]."""

    def __init__(self, width: int, hidden: int, features: int, *, dtype, rngs: nnx.Rngs):
        self.fc0 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.fc4 = Linear(hidden, features, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array) -> Array:
        return self.fc4(jax.nn.silu(self.fc2(jax.nn.silu(self.fc0(x_BND)))))


class Projectors(nnx.Module):
    """One for each network whose features the tokens learn. They feed nothing that is sampled.

    block: number of the block behind which they stand, from 1. width: of their hidden layers. features:
    channels of each network's features."""

    def __init__(self, channels: int, *, block: int, width: int, features: Sequence[int], dtype,
                 rngs: nnx.Rngs):
        self.count = len(features)
        for i, size in enumerate(features):
            setattr(self, f'p{i}', Projector(channels, width, size, dtype=dtype, rngs=rngs))

    def __call__(self, x_BND: Array) -> list[Array]:
        return [getattr(self, f'p{i}')(x_BND) for i in range(self.count)]


def check_projectors(given, depth: int) -> None:
    """Raises UserError for what is no description of projectors in a model of `depth` blocks; None: none."""
    if given is None:
        return
    if not isinstance(given, Mapping) or set(given) != set(FIELDS):
        raise UserError(f'model.projectors has the fields {", ".join(FIELDS)}, got {shown(given)}')
    sizes = given['features']
    if not isinstance(sizes, list | tuple) or not sizes:
        raise UserError(f'model.projectors.features lists the channels of each network, got {shown(sizes)}')
    for name, value, most in (('block', given['block'], depth), ('width', given['width'], 65_536),
                              *(('features', size, 65_536) for size in sizes)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f'model.projectors.{name} must be a whole number from 1 to {most}, got '
                            f'{shown(value)}')
