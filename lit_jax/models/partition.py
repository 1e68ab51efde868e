"""Sharding of activations: the mesh axes of a few named array axes. `lit_jax.training.mesh` shards the
weights. Without a mesh in effect (`jax.set_mesh`), or on one device, nothing happens."""
import math

import jax
from jax.sharding import PartitionSpec as P

Array = jax.Array

# name of an array axis -> the mesh axes that shard it
PLACES = {
    'batch': ('data', 'fsdp'),
    'rows': ('seq',),        # rows of an image or of the token grid
    'tokens': ('seq',),      # rows first, so these are rows as well
    'heads': ('tensor',),
    'hidden': ('tensor',),   # the inner width of the mlp
}


def mesh_axis_size(name: str) -> int:
    """Devices along an axis of the mesh in effect (`jax.set_mesh`); 1 without a mesh or without that axis."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def partition_spec(shape: tuple[int, ...], *names: str | None) -> P:
    """The spec of an array whose axes have these names (None: not sharded). An axis whose size its devices do
    not divide is not sharded: a batch of three images runs on eight devices too. Runs check theirs."""
    def place(size, name):
        axes = tuple(axis for axis in PLACES.get(name, ()) if mesh_axis_size(axis) > 1)
        return axes if axes and size % math.prod(map(mesh_axis_size, axes)) == 0 else None

    return P(*(place(size, name) for size, name in zip(shape, names, strict=True)))


def constrain(x: Array, *names: str | None) -> Array:
    """x with the sharding given by the names of its axes: `constrain(x_BND, 'batch', 'tokens', None)`.
    Otherwise the compiler may leave it whole. Gradients of x are sharded as x is."""
    if jax.sharding.get_abstract_mesh().size <= 1:     # 0 without a mesh
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, *names))
