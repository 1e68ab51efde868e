"""The device mesh, and how each leaf of the train state is sharded over it.

Axes: `data` replicates the weights, `fsdp` shards them (both split the batch), `tensor` shards heads and
hidden widths, `seq` shards rows of the token grid. Activations: `lit_jax.models.partition`."""
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.arch import find_leaf, find_owner
from lit_jax.models.mixers import MIXERS
from lit_jax.models.partition import PLACES
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.leaves import map_named, named_leaves

AXES = ('data', 'fsdp', 'tensor', 'seq')
BATCH = P(PLACES['batch'])

# Axes of a mixer's or ffn's parameters, by the letters of their `shape` (`lit_jax.models.facts.Leaf`). A
# leading layer axis is never sharded, nor is the D of a vector.
LETTERS = {'D': 'fsdp', 'K': 'tensor', 'F': 'tensor'}
VECTORS = ('copy', 'flat')
COPIED = r'(^|/)(came_\w+|ns_coeffs|lora_[ab])$'      # means of CAME, Muon's polynomial, low ranks: small
# Everything else: (pattern of the parameter path, spec), first match wins. Optimizer moments and EMA end with
# the path of their parameter and follow its rule. Runs of unlike blocks are numbered.
RULES = (
    (r'(x_embedder|down\d)/kernel', P(None, None, None, 'fsdp')),
    (r'([ty]_embedder/fc[12]|condition\d)/kernel', P(None, 'fsdp')),
    (r'(y_embedder|embed)/table', P(None, 'fsdp')),
    (r'(x_embedder|[ty]_embedder/fc[12]|joins\d*|down\d|up\d|condition\d|final_layer/linear)/bias', P()),
    (r't_block/kernel', P('fsdp', None, 'tensor')),
    (r't_block/bias', P(None, 'tensor')),
    (r'(blocks\d*|final_layer)/scale_shift_table', P()),
    (r'(blocks\d*/norm[12]|final_layer/norm)/gain', P()),
    (r'projectors/p\d+/fc\d/kernel', P('fsdp', None)),
    (r'projectors/p\d+/fc\d/bias', P()),
    (r'blocks\d*/cross_attn/q/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks\d*/cross_attn/q/bias', P(None, 'tensor', None)),
    (r'blocks\d*/cross_attn/kv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks\d*/cross_attn/kv/bias', P(None, None, 'tensor', None)),
    (r'blocks\d*/cross_attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks\d*/(dwc/(kernel|bias)|cross_attn/proj/bias)', P()),
    (r'joins\d*/kernel', P(None, None, 'fsdp')),
    (r'up\d/kernel', P('fsdp', None, None, None)),
    (r'blocks\d*/adaLN/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks\d*/adaLN/bias', P(None, None, 'tensor')),
    (r'final_layer/adaLN/kernel', P('fsdp', None, 'tensor')),
    (r'final_layer/adaLN/bias', P(None, 'tensor')),
    (r'final_layer/linear/kernel', P('fsdp', None)),
    # The text encoder (lit_jax/models/t5.py), whose blocks have no mixer.
    (r'(position_bias/table|blocks/(attn|mlp)/norm_gain|final_norm/gain)', P()),
    (r'blocks/(attn/(qkv|proj)|mlp/(gate|down))/scale', P()),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/gate/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
)


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """A mesh over `devices` (default: all); sizes: {'data': …, 'fsdp': …, 'tensor': …, 'seq': …}, none -1."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes[axis] for axis in AXES)
    if math.prod(shape) != len(devices):
        raise UserError(f'the mesh {dict(sizes)} needs {math.prod(shape)} devices, here are {len(devices)}')
    # Neighbours on an axis are neighbours in the slice where possible; an axis may be part of a physical one
    # (fsdp 128 on 16x16 chips). Explicit axes, jax's default, would need an out_sharding at each contraction.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def without_mesh():
    """No mesh, inside a block of `jax.set_mesh`: for programs that place their arrays themselves."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def find_rule(path: str, shape: tuple[int, ...], arch: Mapping | None = None, sharded: bool = True) -> P:
    """The PartitionSpec of a leaf by its path; scalars (step, optimizer counts) are replicated.
    arch: of the model, whose mixers and ffn declare how their parameters are sharded; None: it has neither.
    sharded: whether any axis of the mesh shards weights. Parameters that a mixer does not declare are then an
        error (no other mixer's rule is used), otherwise replicated."""
    if not shape or re.search(COPIED, path):
        return P()
    owner = find_owner(arch, path) if arch else None
    if owner is None:
        for pattern, spec in RULES:
            if re.search(rf'(^|/){pattern}$', path):
                return spec
        raise UserError(f'no sharding rule fits {path} {shape}; add one to lit_jax/training/mesh.py')
    if leaf := find_leaf(arch, path):
        whole = 'D' if leaf.transform in VECTORS else None
        axes = [LETTERS.get(letter) if letter != whole else None for letter in leaf.shape]
        return P(None, *axes) if any(axes) else P()
    if not sharded:
        return P()
    name, kind, rest = owner
    others = [other for other, mixer in MIXERS.items()
              if any(re.fullmatch(leaf.path, rest) for leaf in mixer.leaves)]
    hint = f' ({", ".join(others)} declare one of this name, which is not taken)' if others else ''
    raise UserError(f'no sharding rule fits {path} {shape}: {shown(name)} declares no {rest}{hint}; add it '
                    f'to '
                    f'`leaves` of {kind.__module__}.{kind.__name__} (lit_jax.models.facts.Leaf), or train '
                    f'with mesh.fsdp and mesh.tensor 1')


def state_shardings(abstract_state, mesh: Mesh, arch: Mapping | None = None):
    """A tree of NamedSharding for a tree of arrays or ShapeDtypeStructs, by `find_rule`.
    Raises UserError for a leaf that no rule fits or whose axis does not divide: none is silently replicated.
    """
    sharded = any(mesh.shape[axis] > 1 for axis in ('fsdp', 'tensor'))

    def shard(path, leaf):
        spec = find_rule(path, leaf.shape, arch, sharded)
        if len(spec) > len(leaf.shape):
            raise UserError(f'the sharding rule {spec} has more axes than {path} {leaf.shape}')
        for size, axis in zip(leaf.shape, spec, strict=False):   # a spec may name fewer axes
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(f'{path} {leaf.shape}: {size} is not divisible by mesh.{axis} = '
                                f'{mesh.shape[axis]}; choose a mesh.{axis} that divides it')
        return NamedSharding(mesh, spec)

    return map_named(shard, abstract_state)


def format_shardings(abstract_state, mesh: Mesh, arch: Mapping | None = None) -> str:
    """The sharding table: path, shape, dtype, spec, and MB per device."""
    shardings = jax.tree.leaves(state_shardings(abstract_state, mesh, arch))
    rows, total = [], 0.0
    for (path, leaf), sharding in zip(named_leaves(abstract_state).items(), shardings, strict=True):
        size = np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize / 1e6
        total += size
        rows.append(f'{path:58} {str(leaf.shape):26} {leaf.dtype!s:9} {str(sharding.spec):48} {size:9.3f}')
    return '\n'.join([*rows, f'{"total, MB a device":145}{total:9.3f}'])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


class BatchLayout:
    """Which rows of a global batch this process reads, and how they become global arrays.
    rows: positions in the global batch that this process's devices hold, sorted, int64. Hosts that share a
        part of the batch (an axis `tensor` or `seq` across hosts) read the same rows."""

    def __init__(self, mesh: Mesh, batch_size: int):
        self.batch_size, self.sharding = batch_size, NamedSharding(mesh, BATCH)
        parts = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        self.rows = np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays [batch_size, ...] over `data` and `fsdp`, from this process's `rows` of each."""
        return {name: self._place(array) for name, array in batch.items()}

    def _place(self, array):
        def part(index):
            start, stop, _ = index[0].indices(self.batch_size)
            first = np.searchsorted(self.rows, start)      # a device's rows are consecutive in `rows`
            return array[first:first + stop - start]

        return jax.make_array_from_callback((self.batch_size, *array.shape[1:]), self.sharding, part)
