"""A frozen network whose features the student's tokens learn (REPA), named by the recipe.

    config.model.projectors = {'block': 8, 'width': 2048, 'features': (768,)}
    config.train.features = 'my_networks:dinov2'      # (parameters, function)

The function of that name takes nothing and returns (parameters, apply);
apply(parameters, images) is [B, N, C], or a list of them for several networks, with as many tokens N as the
student. images: float32 [B, H, W, C],
those of the batch in [-1, 1]; where the data are cached latents, the clean latents x0 of the step."""
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.own_modules import import_function


@dataclass(frozen=True)
class Features:
    """params: arrays; apply(params, images) -> [[B, N, C], ...]. block: of the student, from 1. weight: of
    the loss."""
    params: Any
    apply: Callable
    block: int
    weight: float

    def __call__(self, params, images) -> list[jax.Array]:
        found = self.apply(params, images)
        found = list(found) if isinstance(found, list | tuple) else [found]
        return [jax.lax.stop_gradient(one) for one in found]


def read_features(config) -> Features | None:
    """Of a recipe; None where it names none. UserError for what is no such function, and for a network
    without projectors or the other way round."""
    name, projectors = config.train.features, config.model.get('projectors')
    if bool(name) != bool(projectors):
        both = 'train.features', 'model.projectors'
        has, lacks = both if name else both[::-1]
        raise UserError(f'{has} is given without {lacks}: the projectors lead from the tokens of a block to '
                        f'the features of a network, so both are needed')
    return Features(*_open(name), projectors['block'], config.train.features_weight) if name else None


@functools.lru_cache(maxsize=2)
def _open(name: str) -> tuple[Any, Callable]:
    made = import_function('the network', name)()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[1])):
        raise UserError(f'the network {name} must return (parameters, function), got {shown(made)}')
    return made
