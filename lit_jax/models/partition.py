"""Where activations lie on the device mesh, said in a few named places of the models.

The weights' places are the business of `lit_jax.training.mesh`; here are those of the arrays between them.
Without a mesh in effect (`jax.set_mesh`), or on one device, nothing happens.
"""
import math

import jax
from jax.sharding import PartitionSpec as P

Array = jax.Array

# name of an array axis -> the mesh axes that cut it
PLACES = {
    'batch': ('data', 'fsdp'),
    'rows': ('seq',),        # rows of an image or of the token grid
    'tokens': ('seq',),      # rows first, so cutting tokens is cutting rows
    'heads': ('tensor',),
    'hidden': ('tensor',),   # the inner width of the mlp
}


def mesh_axis_size(name: str) -> int:
    """Devices along an axis of the mesh in effect (`jax.set_mesh`); 1 without a mesh or without that axis."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def partition_spec(shape: tuple[int, ...], *names: str | None) -> P:
    """The spec of an array whose axes have these names (None: whole on every device).

    An axis that its devices do not divide stays whole: a grid of three images is drawn on eight devices all
    the same. What a run must divide (batch, heads, rows) is checked before it starts.
    """
    def place(size, name):
        axes = tuple(axis for axis in PLACES.get(name, ()) if mesh_axis_size(axis) > 1)
        return axes if axes and size % math.prod(map(mesh_axis_size, axes)) == 0 else None

    return P(*(place(size, name) for size, name in zip(shape, names, strict=True)))


def constrain(x: Array, *names: str | None) -> Array:
    """x, told to lie on the mesh as the names of its axes say: `constrain(x_BND, 'batch', 'tokens', None)`.

    Left to itself the compiler may keep whole what could be cut; gradients of x lie as x does.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:     # 0 without a mesh
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, *names))
