"""A module as functions over a plain dict of its parameters; nothing outside `lit_jax.models` sees nnx."""
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lit_jax.models.layers import Array


class Functional:
    """`abstract`, `init` and, for the functions of a network, `_merge`. build: nnx.Rngs -> module."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        self._graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))      # only shapes
        # Plain structs: under `jax.set_mesh` nnx's have a sharding, into which nothing must be restored.
        self._abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                                      nnx.to_pure_dict(abstract))

    def abstract(self) -> dict:
        """The parameter tree as ShapeDtypeStructs."""
        return self._abstract

    def init(self, key: Array) -> dict:
        """Fresh parameters. Jittable: under `jax.jit(..., out_shardings=...)` no device holds a full copy."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

    def _merge(self, params: dict) -> Any:      # the module that `build` makes
        return nnx.merge(self._graphdef, params)
