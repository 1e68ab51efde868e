"""Arrays on disk through Orbax. Nothing else in the package imports it.

`save_arrays` / `load_arrays` write and read one tree at one path (model folders). `Checkpoints` keeps those of a run:

    workdir/checkpoints/000400000/state/...       parameters, EMA, optimizer, step (Orbax)
    workdir/checkpoints/000400000/meta/metadata   JSON
    workdir/checkpoints/000400000/manifest.json   sizes and checksums of all files

What a kill can leave. Everything, the manifest included, is written in a directory with a temporary name; renaming it
is the commit. So a directory with a final name and no manifest, or with a file that differs from it, is a damaged
checkpoint, never a young one."""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers

from lit_jax.checkpoint import leaves, storage
from lit_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_UNFINISHED = '.orbax-checkpoint-tmp'
# Orbax writes these two while it commits, after the manifest exists; they are entered in it afterwards.
_COMMIT_FILES = ('_CHECKPOINT_METADATA', 'commit_success.txt')

# Numpy leaves are written from where they lie. By default Orbax copies them first: twice the memory for a large model.
_UNCOPIED = type_handlers.create_type_handler_registry(
    (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, type_handlers.ArrayHandler()),
)


def _to_array(leaf):
    """A form of the leaf that Orbax gives back as it was: numpy scalars fail on restore, so they become 0-d arrays."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf  # spread over several hosts: each writes its own part
    return np.asarray(leaf)


def save_arrays(path, tree) -> None:
    """Writes the arrays of a nested dict to the new directory `path`, and returns when they are on disk.

    Leaves: numpy or jax arrays of any numeric dtype, none of size zero. Numpy arrays, and jax arrays on CPU, are not
    copied to write them.
    Raises UserError on a full disk; the directory is then absent."""
    path = Path(path).absolute()
    needed = leaves.tree_bytes(tree)
    storage.check_free_space(path, needed)
    with storage.explain_full_disk(path, needed):
        write_arrays(path, tree)


def write_arrays(path: Path, tree) -> None:
    """`save_arrays` for a caller that explains a full disk itself: its errors pass through as they are."""
    if not jax.tree.leaves(tree):
        raise UserError(f'there are no arrays to save in {path}.')
    empty = [name for name, leaf in leaves.named_leaves(tree).items() if np.size(leaf) == 0]
    if empty:
        raise UserError(f'arrays of size zero cannot be saved: {", ".join(empty)}. Leave them out of the tree.')
    # One directory per array, uncompressed: compression took 15 times as long for a tenth of the space (measured).
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=_UNCOPIED)
    path.mkdir(parents=True)
    try:
        handler.save(path, args=ocp.args.PyTreeSave(jax.tree.map(_to_array, tree)))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        handler.close()


def load_arrays(path, abstract=None):
    """Reads what `save_arrays` wrote.

    abstract: None for the stored nested dict of numpy arrays, or a tree of jax.ShapeDtypeStruct (arrays do too) that
    the result must match in structure, shapes and dtypes; then leaves are jax arrays with each leaf's sharding (none
    given: the first local device). Raises one UserError that lists all leaves that do not fit."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f'no arrays at {path}: there is no such directory. Give a path that was saved by lit_jax.')
    return _restore(path, abstract, str(path))


def _restore(path: Path, abstract, source: str, only: str | None = None):
    """Reads a tree from an Orbax directory; with `only`, just the subtree (of structure `abstract`) under that key."""
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(path).tree
    if only is not None:
        if only not in stored:
            raise UserError(f'{source}: there is no entry "{only}", only {", ".join(sorted(stored))}.')
        stored = {only: stored[only]}
        abstract = None if abstract is None else {only: abstract}
    if abstract is None:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    else:
        wanted = leaves.named_leaves(abstract)
        leaves.check_leaves(leaves.named_leaves(stored), wanted, source)
        args = leaves.map_named(lambda name, _: _restore_args(wanted[name]), stored)
    restored = handler.restore(
        path, args=ocp.args.PyTreeRestore(item=stored, restore_args=args, partial_restore=only is not None))
    handler.close()
    if abstract is not None:
        # Back into named tuples, tuples and empty nodes: Orbax knows dicts and lists only.
        found = leaves.named_leaves(restored)
        restored = leaves.map_named(lambda name, _: found[name], abstract)
    return restored if only is None else restored[only]


def _restore_args(leaf) -> ocp.ArrayRestoreArgs:
    """Shape, dtype and sharding are always ours: a sharding on the disk belongs to the machine that wrote it."""
    sharding = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Kept: the newest `keep_latest`, and every step divisible by `keep_every` (0: none). Only the run that trains may
    call `save` and `restore_latest` (both tidy the directory); `steps` and `restore_part` only read."""

    def __init__(self, workdir, *, keep_latest: int = 3, keep_every: int = 0):
        if keep_latest < 1 or keep_every < 0:
            raise UserError(f'keep_latest must be at least 1 and keep_every at least 0, got {keep_latest} and '
                            f'{keep_every}. Change them in the recipe.')
        self.directory = Path(workdir).absolute() / 'checkpoints'
        self._options = {'max_to_keep': keep_latest, 'keep_period': keep_every or None}
        self._manager = None  # opened by the first save, so that a reader touches nothing
        self._saving = None  # (step, bytes) of the save that may still run

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """Steps whose checkpoints are committed, in rising order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r'\d{9,}', path.name))

    def save(self, step: int, state, meta: dict) -> bool:
        """Starts saving; returns once the state may be changed or donated. False where `step` is saved already.

        Waits for the save before, and raises its UserError when that one met a full disk; nothing is then saved now.
        step: updates done. state: tree of jax or numpy arrays, none of size zero. meta: anything JSON can hold."""
        step = int(step)
        json.dumps(meta)  # what JSON cannot hold fails here, not in the background
        self.wait()
        if step in self.steps():
            return False
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), state)
        needed = leaves.tree_bytes(state)
        storage.check_free_space(self._path(step), needed)
        self._saving = step, needed
        with self._explain_failure():
            if self._manager is None:
                self._manager = self._open()
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)))
        return True

    def wait(self) -> None:
        """Waits until the running save is on disk. UserError if it met a full disk; older checkpoints stay intact."""
        if self._saving is None:
            return
        with self._explain_failure():
            self._manager.wait_until_finished()
        step, self._saving = self._saving[0], None
        self._complete_manifest(step)

    def close(self) -> None:
        """Waits for the running save, and releases Orbax's threads. The next save would open them again."""
        try:
            self.wait()
        finally:
            self._release()

    def restore_latest(self, abstract_state):
        """(state, meta, step) of the newest whole checkpoint, or None where nothing was ever saved.

        abstract_state: tree of jax.ShapeDtypeStruct; the result has its structure (named tuples too), shapes, dtypes
        and shardings. Newer checkpoints with a missing or damaged file are logged and moved aside, to
        `<step>.damaged`; directories of unfinished saves are deleted. Raises UserError when no checkpoint is whole (all
        stay where they are) or when the newest whole one belongs to another recipe."""
        self.wait()
        self._remove_unfinished()
        step, damaged = self._newest_whole()
        if step is None:
            return None
        path = self._path(step)
        state = _restore(path / 'state', abstract_state, f'checkpoint {path}')
        self._barrier()  # no process may rename what another still checks
        self._complete_manifest(step)
        if jax.process_index() == 0:
            for other in damaged:
                self._move_aside(other)
        if damaged:
            self._barrier()
            if self._manager is not None:
                self._manager.reload()  # or it would refuse to save these steps again
            _LOG.warning('going on from step %d, the newest whole checkpoint', step)
        return state, ocp.JsonCheckpointHandler().restore(path / 'meta'), step

    def restore_part(self, name: str, abstract=None):
        """(subtree, step): the top-level entry `name` ('ema') of the newest whole checkpoint, and no other.

        Changes nothing on the disk, so a run that trains in the same place is not disturbed. abstract: as for
        `load_arrays`. Raises UserError where there is no checkpoint, none is whole, or the entry does not fit."""
        step, _ = self._newest_whole()
        if step is None:
            raise UserError(f'there is no checkpoint in {self.directory} yet. Train until the first one is saved.')
        path = self._path(step)
        return _restore(path / 'state', abstract, f'{name} of checkpoint {path}', name), step

    def _path(self, step: int) -> Path:
        return self.directory / f'{step:09d}'

    def _open(self) -> ocp.CheckpointManager:
        self._remove_unfinished()
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=9),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest), save_root_metadata=False,
            **self._options)
        handlers = {'state': ocp.PyTreeCheckpointHandler(use_compression=False), 'meta': ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _write_manifest(self) -> None:
        """Orbax calls this in its background thread when all items are written and the directory is not renamed yet.

        (Should a later Orbax call it after the rename, a kill in between costs one checkpoint, and is still safe.)"""
        step, _ = self._saving
        unfinished = list(self.directory.glob(f'{step:09d}{_UNFINISHED}*'))
        storage.write_manifest(unfinished[0] if unfinished else self._path(step), skip=_COMMIT_FILES)

    def _complete_manifest(self, step: int) -> None:
        """Enters the files that Orbax wrote while it committed. The arrays are listed already: failure is harmless."""
        if jax.process_index() == 0:
            try:
                storage.add_to_manifest(self._path(step), _COMMIT_FILES)
            except OSError as e:
                _LOG.warning('the checkpoint of step %d is whole, but its manifest could not be completed: %s', step, e)

    @contextlib.contextmanager
    def _explain_failure(self):
        """After a save that failed, no thread, half-written directory or memory of it remain; explains a full disk."""
        step, needed = self._saving
        try:
            with storage.explain_full_disk(self._path(step), needed):
                yield
        except BaseException:
            try:
                self._release()
            finally:
                self._saving = None
                self._remove_unfinished()
            raise

    def _release(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _remove_unfinished(self) -> None:
        if self.directory.is_dir() and jax.process_index() == 0:
            for path in self.directory.glob(f'*{_UNFINISHED}*'):
                shutil.rmtree(path, ignore_errors=True)

    def _newest_whole(self) -> tuple[int | None, list[int]]:
        """(newest step whose files agree with its manifest, or None without any checkpoint; damaged steps above it)."""
        damaged, problems = [], []
        for step in reversed(self.steps()):
            problems = storage.find_damage(self._path(step))
            if not problems:
                return step, damaged
            for problem in problems:
                _LOG.warning('checkpoint of step %d cannot be used: %s', step, problem)
            damaged.append(step)
        if damaged:
            raise UserError(f'none of the {len(damaged)} checkpoints in {self.directory} is whole; the oldest one: '
                            f'{problems[0]}. Bring the files back from a copy, or delete that directory to begin again '
                            'from step 0.')
        return None, []

    def _move_aside(self, step: int) -> None:
        target, count = self.directory / f'{step:09d}.damaged', 1
        while target.exists():
            count += 1
            target = self.directory / f'{step:09d}.damaged{count}'
        self._path(step).rename(target)
        _LOG.warning('moved the damaged checkpoint of step %d to %s; it can be deleted', step, target)

    def _barrier(self) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('lit_jax checkpoint verified')
