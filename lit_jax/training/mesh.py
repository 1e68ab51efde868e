"""The device mesh and the one table that says how every leaf of the train state lies on it.

Axes: `data` copies the weights, `fsdp` cuts them (both split the batch), `tensor` cuts heads and hidden
widths, `seq` cuts rows of the token grid. Activations: `lit_jax.models.partition`.
"""
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.partition import PLACES
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import map_named, named_leaves

AXES = ('data', 'fsdp', 'tensor', 'seq')
BATCH = P(PLACES['batch'])

# (pattern of the parameter path, spec), first match wins. Optimizer moments and EMA end with the path of
# their parameter and take its rule. Kernels of the blocks have a leading layer axis, which is never cut;
# unlike runs of blocks are numbered.
RULES = (
    (r'came_\w+', P()),     # row and column means of CAME: small, copied (lit_jax/training/came.py)
    (r'ns_coeffs', P()),    # the polynomial of Muon
    (r'x_embedder/kernel', P(None, None, None, 'fsdp')),
    (r't_embedder/fc[12]/kernel', P(None, 'fsdp')),
    (r'y_embedder/table', P(None, 'fsdp')),
    # The text encoder (lit_jax/models/t5.py); the kernels of its blocks are named further down.
    (r'embed/table', P(None, 'fsdp')),
    (r'(position_bias/table|blocks/(attn|mlp)/norm_gain|final_norm/gain)', P()),
    (r'blocks/(attn/(qkv|proj)|mlp/(gate|down))/scale', P()),
    (r'y_embedder/fc[12]/kernel', P(None, 'fsdp')),
    (r'y_embedder/fc[12]/bias', P()),
    (r't_block/kernel', P('fsdp', None, 'tensor')),
    (r't_block/bias', P(None, 'tensor')),
    (r'(blocks\d*|final_layer)/scale_shift_table', P()),
    (r'blocks\d*/cross_attn/q/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/cross_attn/q/bias', P(None, 'tensor', None)),
    (r'blocks\d*/cross_attn/kv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks\d*/cross_attn/kv/bias', P(None, None, 'tensor', None)),
    (r'blocks\d*/cross_attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks\d*/cross_attn/proj/bias', P()),
    (r'blocks\d*/attn/(qkv|kv)/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks\d*/attn/(qkv|kv)/bias', P(None, None, 'tensor', None)),
    (r'blocks\d*/attn/q/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/attn/q/bias', P(None, 'tensor', None)),
    (r'blocks\d*/attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks\d*/attn/dwc/(kernel|bias)', P()),       # k·k·E numbers a layer, shared by the heads: copied
    (r'blocks\d*/attn/(focus_scale|key_table)', P()),
    (r'blocks\d*/attn/compressor/kernel', P(None, None, None, 'tensor', None)),
    (r'blocks\d*/attn/compressor/(bias|norm_gain|norm_bias)', P(None, 'tensor', None)),
    (r'blocks\d*/attn/(router|shared_router|kinds_router)/kernel', P(None, 'fsdp', None)),
    (r'blocks\d*/attn/fusion/compress/kernel', P(None, None, None, 'fsdp', 'tensor')),
    (r'blocks\d*/attn/fusion/restore/kernel', P(None, None, None, 'tensor', 'fsdp')),
    (r'blocks\d*/attn/fusion/(compress/bias|norm/gain|norm/bias)', P(None, 'tensor')),
    (r'blocks\d*/attn/fusion/restore/bias', P()),
    (r'blocks\d*/attn/[kv]/linear/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/attn/[kv]/(linear/bias|bias)', P(None, 'tensor', None)),
    (r'blocks\d*/attn/[kv]/kernel', P(None, None, None, 'tensor', None)),
    (r'blocks\d*/attn/value/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/attn/value/bias', P(None, 'tensor', None)),
    (r'blocks\d*/attn/routed_[qk]/kernel', P(None, None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/attn/(routed_[qk]/router|power_\w+|difference_\w+)/kernel', P(None, 'fsdp', None)),
    (r'blocks\d*/attn/(gamma|factor|dwc/(square|column|row))', P()),
    (r'blocks\d*/attn/(key|gate|value_decay)/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/attn/decay_in/kernel', P(None, 'fsdp', None)),
    (r'blocks\d*/attn/decay_out/kernel', P(None, None, 'tensor', None)),
    (r'blocks\d*/attn/(gate|decay_out|value_decay)/bias', P(None, 'tensor', None)),
    (r'blocks\d*/attn/norm_(gain|bias)', P()),       # shared by the heads
    (r'blocks\d*/dwc/(kernel|bias)', P()),
    (r'blocks\d*/mlp/gate/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks\d*/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
    (r'joins\d*/kernel', P(None, None, 'fsdp')),
    (r'down\d/kernel', P(None, None, None, 'fsdp')),
    (r'condition\d/kernel', P(None, 'fsdp')),
    (r'up\d/kernel', P('fsdp', None, None, None)),
    (r'(joins\d*|down\d|up\d|condition\d)/bias', P()),
    (r'blocks\d*/mlp/inverted/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks\d*/mlp/(inverted|depth)/bias', P(None, None, 'tensor')),
    (r'blocks\d*/mlp/depth/kernel', P(None, None, None, None, 'tensor')),
    (r'blocks\d*/mlp/point/kernel', P(None, 'tensor', 'fsdp')),
    (r'blocks\d*/mlp/fc1/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks\d*/mlp/fc1/bias', P(None, 'tensor')),
    (r'blocks\d*/mlp/fc2/kernel', P(None, 'tensor', 'fsdp')),
    (r'blocks\d*/adaLN/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks\d*/adaLN/bias', P(None, None, 'tensor')),
    (r'final_layer/adaLN/kernel', P('fsdp', None, 'tensor')),
    (r'final_layer/adaLN/bias', P(None, 'tensor')),
    (r'final_layer/linear/kernel', P('fsdp', None)),
    (r'(x_embedder|t_embedder/fc[12]|blocks\d*/attn/proj|blocks\d*/mlp/fc2|final_layer/linear)/bias', P()),
)


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """A mesh over `devices` (default: all) with sizes {'data': …, 'fsdp': …, 'tensor': …, 'seq': …}, none of
    them -1."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes[axis] for axis in AXES)
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f'the mesh {dict(sizes)} needs {int(np.prod(shape))} devices, here are {len(devices)}')
    # Neighbours on an axis are neighbours in the slice where that can be; an axis may take part of a physical
    # one (fsdp 128 on 16x16 chips). Explicit axes, jax's default, would want an out_sharding at every
    # contraction.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def without_mesh():
    """A block in which no mesh is in effect, inside one of `jax.set_mesh`: for programs that lay out their
    devices themselves."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def find_rule(path: str, shape: tuple[int, ...]) -> P:
    """The PartitionSpec of a leaf by its path; numbers (step, optimizer counts) are copied."""
    if not shape:
        return P()
    for pattern, spec in RULES:
        if re.search(rf'(^|/){pattern}$', path):
            return spec
    raise UserError(f'no sharding rule fits {path} {shape}; add one to lit_jax/training/mesh.py')


def state_shardings(abstract_state, mesh: Mesh):
    """A tree of NamedSharding for a tree of arrays or ShapeDtypeStructs, by RULES.

    A leaf that no rule fits, or whose axis does not divide, is an error: nothing is silently copied to all
    devices.
    """
    def shard(path, leaf):
        spec = find_rule(path, leaf.shape)
        if len(spec) > len(leaf.shape):
            raise UserError(f'the sharding rule {spec} has more axes than {path} {leaf.shape}')
        for size, axis in zip(leaf.shape, spec, strict=False):   # a spec may name fewer axes
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(f'{path} {leaf.shape}: {size} is not divisible by mesh.{axis} = '
                                f'{mesh.shape[axis]}; choose a mesh.{axis} that divides it')
        return NamedSharding(mesh, spec)

    return map_named(shard, abstract_state)


def format_shardings(abstract_state, mesh: Mesh) -> str:
    """The sharding table: path, shape, dtype, spec, and MB a device."""
    shardings = state_shardings(abstract_state, mesh)
    rows, total = [], 0.0
    for (path, leaf), sharding in zip(named_leaves(abstract_state).items(), jax.tree.leaves(shardings),
                                      strict=True):
        megabytes = np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize / 1e6
        total += megabytes
        rows.append(f'{path:58} {str(leaf.shape):26} {leaf.dtype!s:9} {str(sharding.spec):48} '
                    f'{megabytes:9.3f}')
    return '\n'.join([*rows, f'{"total, MB a device":145}{total:9.3f}'])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


class BatchLayout:
    """Where the rows of a global batch lie: which of them this process must read, and how they become global
    arrays.

    Attributes:
        rows: positions in the global batch that this process's devices hold, sorted, int64. Hosts that share
            a part of the batch (an axis `tensor` or `seq` across hosts) read the same rows.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.batch_size, self.sharding = batch_size, NamedSharding(mesh, BATCH)
        parts = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        self.rows = np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays [batch_size, ...] split over `data` and `fsdp`, from this process's `rows` of
        each."""
        return {name: self._place(array) for name, array in batch.items()}

    def _place(self, array):
        def part(index):
            start, stop, _ = index[0].indices(self.batch_size)
            first = np.searchsorted(self.rows, start)      # a device's rows are consecutive in `rows`, too
            return array[first:first + stop - start]

        return jax.make_array_from_callback((self.batch_size, *array.shape[1:]), self.sharding, part)
