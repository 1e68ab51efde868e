"""Trees of arrays on disk, one at a path (model folders), through Orbax.

Every array is a Zarr directory of its own. The layers of a large stack can be stored one by one, so that
`each_rows` reads them in little more memory than its caller keeps. (`load_arrays` takes more for such parts:
it reads all at once.)"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint import type_handlers

from lit_jax.checkpoint.null_caption import without_null_caption
from lit_jax.runtime import leaves, peers, storage
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import absolute, explain_unwritable, is_remote, remove_tree

LARGE_STACK = 2 ** 27   # bytes; smaller ones are stored whole

# Numpy leaves are written in place. By default Orbax copies them first: twice the memory for a large model.
_UNCOPIED = type_handlers.create_type_handler_registry(
    (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, type_handlers.ArrayHandler()))


def _to_array(leaf):
    """The leaf as Orbax restores it: numpy scalars fail there, so they become 0-d arrays."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf  # spread over several hosts: each writes its own part
    return np.asarray(leaf)


def _by_layer(array) -> ocp.SaveArgs:
    # Three axes or more: a stack of matrices, so no table whose rows would be a file each.
    return ocp.SaveArgs(shard_axes=(0,)) if array.ndim > 2 and array.nbytes > LARGE_STACK else ocp.SaveArgs()


def save_arrays(path, tree, *, by_layer: bool = False) -> None:
    """Writes the arrays of a nested dict to the new directory `path`, and returns when they are on disk.

    Leaves: numpy or jax arrays of any numeric dtype, none of size zero. Numpy arrays, and jax arrays on CPU,
    are not copied first. by_layer: layers of large stacks are stored one by one, for `each_rows`. All
    processes call it with the same tree; each writes its parts of sharded arrays. Raises UserError on a full
    disk; the directory is then absent."""
    path = absolute(path)
    needed = leaves.tree_bytes(tree)
    with explain_unwritable(path, needed):
        peers.only_lead(lambda: storage.check_free_space(path, needed))
        write_arrays(path, tree, by_layer=by_layer)


def write_arrays(path: epath.Path, tree, *, by_layer: bool = False) -> None:
    """`save_arrays` for a caller that explains a full disk itself: errors pass through unchanged."""
    if not jax.tree.leaves(tree):
        raise UserError(f'there are no arrays to save in {path}.')
    empty = [name for name, leaf in leaves.named_leaves(tree).items() if np.size(leaf) == 0]
    if empty:
        raise UserError(f'arrays of size zero cannot be saved: {", ".join(empty)}. Leave them out.')
    # One directory per array, uncompressed: compressing took 15 times as long and saved a tenth (measured).
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=_UNCOPIED)
    peers.only_lead(lambda: path.mkdir(parents=True))
    try:
        arrays = jax.tree.map(_to_array, tree)
        args = ocp.args.PyTreeSave(arrays, save_args=jax.tree.map(_by_layer, arrays) if by_layer else None)
        peers.together(lambda: handler.save(path, args=args))
    except BaseException:
        if peers.is_lead():
            remove_tree(path)
        raise
    finally:
        handler.close()


def load_arrays(path, abstract=None):
    """Reads what `save_arrays` wrote.

    abstract: None for the stored nested dict of numpy arrays, or a tree of jax.ShapeDtypeStruct or arrays
    that the result must match in structure, shapes and dtypes; leaves are then jax arrays with each leaf's
    sharding (default: the first local device). If a sharding spans several processes, all call it, and each
    reads its own parts. Raises one UserError that lists all leaves that do not fit."""
    path = absolute(path)

    def load():
        if not path.is_dir():
            raise UserError(f'no arrays at {path}: there is no such directory. Give a path saved by lit_jax.')
        return restore_tree(path, abstract, str(path))

    return peers.together(load)


def restore_tree(path: epath.Path, abstract, source: str, only: str | None = None,
                 beside: str | None = None):
    """Reads a tree from an Orbax directory; with `only`, the subtree (as `abstract`, also a function of its
    named leaves) under that key, in which leaves that it lacks are those of the subtree `beside`."""
    handler = ocp.PyTreeCheckpointHandler()
    whole = handler.metadata(path).tree
    stored = without_null_caption(whole)       # as earlier versions stored it among the parameters
    if only is not None:
        if only not in stored:
            raise UserError(f'{source}: there is no entry "{only}", only {", ".join(sorted(stored))}.')
        names = leaves.named_leaves(stored[only])
        abstract = abstract(names) if callable(abstract) else abstract
        lacking = [name for name in leaves.named_leaves(stored.get(beside, {})) if name not in names]
        stored = {only: stored[only], **({beside: leaves.pick(stored[beside], lacking)} if lacking else {})}
        if abstract is not None and not lacking:
            abstract = {only: abstract}
        elif abstract is not None:
            wanted = leaves.named_leaves(abstract)
            abstract = leaves.unflatten({f'{beside if name in lacking else only}/{name}': leaf
                                         for name, leaf in wanted.items()})
    if abstract is None:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    else:
        wanted = leaves.named_leaves(abstract)
        leaves.check_leaves(leaves.named_leaves(stored), wanted, source)
        args = leaves.map_named(lambda name, _: _restore_args(wanted[name]), stored)
    partial = len(jax.tree.leaves(stored)) < len(jax.tree.leaves(whole))
    args = ocp.args.PyTreeRestore(item=stored, restore_args=args, partial_restore=partial)
    restored = handler.restore(path, args=args)
    handler.close()
    if abstract is not None:
        # Back into named tuples, tuples and empty nodes: Orbax knows dicts and lists only.
        found = leaves.named_leaves(restored)
        restored = leaves.map_named(lambda name, _: found[name], abstract)
    if only is None:
        return restored
    return {**restored[only]} if beside not in restored else leaves.merged(restored[beside], restored[only])


def read_leaf(path: epath.Path, name: str) -> np.ndarray | None:
    """The array `name` of a tree in an Orbax directory; None where it has none of that name."""
    handler = ocp.PyTreeCheckpointHandler()
    stored = leaves.named_leaves(handler.metadata(path).tree)
    if name in stored:
        item = leaves.unflatten({name: stored[name]})
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        item = handler.restore(path, args=args)
    handler.close()
    return leaves.named_leaves(item)[name] if name in stored else None


class Rows(NamedTuple):
    """Rows `start`, start + 1, ... of the array `name`, which has `length` of them (one, of a scalar)."""
    name: str
    start: int
    length: int
    values: np.ndarray

    @property
    def are_all(self) -> bool:
        return self.values.ndim == 0 or len(self.values) == self.length


def each_rows(path) -> Iterator[Rows]:
    """All that `save_arrays` wrote, the largest array first, as many rows at a time as are stored together;
    only those are in memory if the caller lets go of them (`del`) before asking for the next."""
    path, handler = absolute(path), ocp.PyTreeCheckpointHandler()
    stored = leaves.named_leaves(handler.metadata(path).tree)
    handler.close()
    for name in sorted(stored, key=lambda name: -math.prod(stored[name].shape)):
        place = path / name.replace('/', '.')
        store = f'{place}/' if is_remote(path) else {'driver': 'file', 'path': f'{place}/'}
        # Orbax itself cannot read a part of an array.
        array = tensorstore.open({'driver': 'zarr', 'kvstore': store}, open=True, read=True).result()
        length, rows = (array.shape[0], array.chunk_layout.read_chunk.shape[0]) if array.rank else (1, 1)
        for start in range(0, length, rows):
            part = array[start:min(start + rows, length)] if array.rank else array
            yield Rows(name, start, length, part.read().result())


def _restore_args(leaf) -> ocp.ArrayRestoreArgs:
    """Shape, dtype and sharding are ours: a sharding on the disk belongs to the machine that wrote it."""
    sharding = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape,
                                dtype=leaf.dtype)
