"""Networks of recipes, made once for all recipes of one architecture."""
import functools
import json

from lit_jax import recipes
from lit_jax.models.network import Network


def network_of(config) -> Network:
    return _made(json.dumps(recipes.architecture(config)))


@functools.cache
def _made(arch: str) -> Network:
    return Network(json.loads(arch))
