"""The checkpoints of a run on disk, through Orbax:

    workdir/checkpoints/000400000/state/...       parameters, EMA, optimizer, step (Orbax)
    workdir/checkpoints/000400000/meta/metadata   JSON
    workdir/checkpoints/000400000/manifest.json   sizes and checksums of all files

If a run is killed: everything, the manifest included, is written in a directory with a temporary name;
renaming it is the commit. So a directory with a final name and no manifest, or with a file that differs from
it, is damaged, not unfinished. In an object store (gs://...) nothing can be renamed: there Orbax writes under
the final name, and the object `commit_success.txt`, written last, is the commit. (Tested with gcsfs and
TensorStore against the server of tests/checkpoint/test_gcs.py, not against Google's own.)

Several processes: each writes its part of every array; process 0 writes what is written once, finds the
newest undamaged checkpoint (it alone reads all bytes to check them), and cleans up. All methods but `steps`
are collective."""

import contextlib
import json
import logging
import os
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lit_jax.checkpoint.arrays import read_leaf, restore_tree
from lit_jax.checkpoint.save_together import SaveTogether
from lit_jax.runtime import claim, leaves, peers, storage
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.paths import absolute, explain_unwritable, is_remote, remove_tree, write_text_atomic

_LOG = logging.getLogger(__name__)
_UNFINISHED = '.orbax-checkpoint-tmp'
# Orbax writes these two while it commits, after the manifest exists; they are added to it afterwards.
_COMMITTED = 'commit_success.txt'
_COMMIT_FILES = ('_CHECKPOINT_METADATA', _COMMITTED)
_DAMAGED = 'damaged.txt'  # in an object store: stands in a damaged checkpoint in place of commit_success.txt


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Kept: the newest `keep_latest`, and every step divisible by `keep_every` (0: none). Only the run that
    trains may call `save` and `restore_latest` (both clean up the directory); `steps` and `restore_part` only
    read. workdir: local, or in a bucket (gs://...), which Orbax and TensorStore read and write directly."""

    def __init__(self, workdir, *, keep_latest: int = 3, keep_every: int = 0):
        if keep_latest < 1 or keep_every < 0:
            raise UserError(f'keep_latest must be at least 1 and keep_every at least 0, got {keep_latest} '
                            f'and {keep_every}. Change them in the recipe.')
        self.directory = absolute(workdir) / 'checkpoints'
        self._options = {'max_to_keep': keep_latest, 'keep_period': keep_every or None}
        self._manager = None  # opened by the first save, so that a reader touches nothing
        self._together = None  # opened with it
        self._saving = None  # (step, bytes) of the save that may still run

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """Steps whose checkpoints are committed, in rising order."""
        if not self.directory.is_dir():
            if not is_remote(self.directory) and os.path.lexists(self.directory):
                raise UserError(f'{self.directory} is no folder, and no link to one. Restore it, or give '
                                'another workdir.')
            return []
        found = [path for path in self.directory.iterdir() if re.fullmatch(r'\d{9,}', path.name)]
        if is_remote(self.directory):
            found = [path for path in found if (path / _COMMITTED).exists()]
        return sorted(int(path.name) for path in found)

    def newest_whole(self) -> int:
        """The newest step whose checkpoint is undamaged; UserError if there is none. For one process."""
        step, _ = self._newest_whole()
        if step is None:
            raise self._lacking()
        return step

    def save(self, step: int, state, meta: dict) -> bool:
        """Starts saving; returns once the state may be changed. False if `step` is saved already.

        Waits for the previous save, and raises its UserError if that one met a full disk; then nothing is
        saved now. step: updates done. state: tree of jax or numpy arrays, none of size zero. meta: JSON."""
        step = int(step)
        json.dumps(meta)  # what JSON cannot hold fails here, not in the background
        self.wait()
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), state)
        needed = leaves.tree_bytes(state)
        if not peers.from_lead(lambda: self._may_save(step, needed)):
            return False
        self._saving = step, needed
        with self._explain_failure():
            if self._manager is None:
                self._manager = self._open()
            self._together.begin()
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)))
        return True

    def _may_save(self, step: int, needed: int) -> bool:
        claim.check()
        if step in self.steps():
            return False
        storage.check_free_space(self._path(step), needed)
        return True

    def wait(self) -> None:
        """Waits for the running save. UserError if it met a full disk; older checkpoints stay intact."""
        if self._saving is None:
            return
        step, needed = self._saving

        def finish():
            with explain_unwritable(self._path(step), needed):
                self._manager.wait_until_finished()

        with self._explain_failure():
            peers.together(finish)
        self._saving = None
        self._complete_manifest(step)

    def close(self) -> None:
        """Waits for the running save, and releases Orbax's threads. The next save would open them again."""
        try:
            self.wait()
        finally:
            self._release()

    def restore_latest(self, abstract_state):
        """(state, meta, step) of the newest undamaged checkpoint, or None if nothing was ever saved.

        abstract_state: tree of jax.ShapeDtypeStruct, or a function of the step that gives it; the result has
        its structure (named tuples too), shapes, dtypes and shardings. Newer checkpoints with a missing or
        damaged file are logged and renamed to
        `<step>.damaged`; unfinished ones are deleted. Raises UserError when all checkpoints are damaged (they
        stay in place) or when the newest undamaged one belongs to another recipe."""
        self.wait()
        step, damaged = peers.from_lead(self._tidy_and_choose)
        if step is None:
            return None
        path = self._path(step)
        abstract = abstract_state(step) if callable(abstract_state) else abstract_state

        def read():
            state = restore_tree(path / 'state', abstract, f'checkpoint {path}')
            return state, ocp.JsonCheckpointHandler().restore(path / 'meta')

        state, meta = peers.together(read)
        self._complete_manifest(step)
        if damaged:
            peers.only_lead(lambda: self._move_all_aside(damaged, step))
            if self._manager is not None:
                self._manager.reload()  # or it would refuse to save these steps again
        return state, meta, step

    def _tidy_and_choose(self) -> tuple[int | None, list[int]]:
        self._remove_unfinished()      # nobody is saving: a save begins with a barrier that needs process 0
        return self._newest_whole()

    def _move_all_aside(self, damaged: list[int], newest_whole: int) -> None:
        for step in damaged:
            self._move_aside(step)
        _LOG.warning('resuming from step %d, the newest undamaged checkpoint', newest_whole)

    def restore_part(self, name: str, abstract=None, step: int | None = None, beside: str | None = None):
        """(subtree, step): the entry `name` ('ema') of the newest undamaged checkpoint, or of that of `step`;
        leaves that it lacks are those of the entry `beside` ('params').

        Changes nothing on disk. abstract: as for `restore_tree`. Raises UserError if there is no checkpoint,
        all are damaged, or the entry does not fit."""
        if step is None:
            step, _ = peers.from_lead(self._newest_whole)
        else:
            peers.only_lead(lambda: self._check_whole(step))
        if step is None:
            raise self._lacking()
        source = self._path(step) / 'state'
        shown = f'{name} of checkpoint {source.parent}'
        return peers.together(lambda: restore_tree(source, abstract, shown, name, beside)), step

    def _lacking(self) -> UserError:
        return UserError(f'there is no checkpoint in {self.directory} yet; train until one is saved.')

    def _path(self, step: int) -> epath.Path:
        return self.directory / f'{step:09d}'

    def _open(self) -> ocp.CheckpointManager:
        peers.only_lead(self._make_ready)
        barrier = ocp.multihost.get_barrier_sync_fn()
        together = self._together = SaveTogether(barrier, self._directory_being_written)
        # In an object store commit_success.txt is the commit; Orbax itself chooses so for gs:// only.
        commit = ocp.path.atomicity.CommitFileTemporaryPath if is_remote(self.directory) else None
        options = ocp.CheckpointManagerOptions(
            temporary_path_class=commit,
            step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=9,
                                                                temporary_path_cls=commit),
            async_options=ocp.AsyncOptions(
                post_finalization_callback=lambda: together.commit(self._write_manifest),
                barrier_sync_fn=together.barrier),
            save_root_metadata=False, **self._options)
        handlers = {'state': together.guard(ocp.PyTreeCheckpointHandler(use_compression=False)),
                    'meta': together.guard(ocp.JsonCheckpointHandler())}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _make_ready(self) -> None:
        self._remove_unfinished()
        self.directory.mkdir(parents=True, exist_ok=True)

    def _write_manifest(self) -> None:
        """Called by Orbax in a thread of process 0, when all parts are written and the directory is not yet
        committed. (If a later Orbax commits first, a kill in between costs that checkpoint, no more.)"""
        path = self._directory_being_written()
        if problem := _problem_of_state(path, self._saving[0]):
            raise UserError(f'{problem}. This checkpoint is not kept')
        claim.check()
        storage.write_manifest(path, skip=_COMMIT_FILES)

    def _directory_being_written(self) -> epath.Path:
        path = self._path(self._saving[0])
        if is_remote(path):
            return path
        usual = path.with_name(path.name + _UNFINISHED)
        if usual.exists():      # by name first: a listing over a network may be out of date
            return usual
        unfinished = [other for other in self._unfinished() if other.name.startswith(path.name)]
        return unfinished[0] if unfinished else path

    def _complete_manifest(self, step: int) -> None:
        """Enters the files of the commit. The arrays are listed already: failure is harmless."""
        if peers.is_lead():
            try:
                storage.add_to_manifest(self._path(step), _COMMIT_FILES)
            except OSError as e:
                _LOG.warning('checkpoint of step %d is saved, but its manifest is incomplete: %s', step, e)

    @contextlib.contextmanager
    def _explain_failure(self):
        """Explains a full disk; leaves no thread, directory or memory of a save that failed."""
        step, needed = self._saving
        try:
            with explain_unwritable(self._path(step), needed):
                yield
        except BaseException:
            try:
                self._release()
            finally:
                self._saving = None
                if not claim.is_lost():      # what is unfinished may be of the run that has it now
                    self._remove_unfinished()
            raise

    def _release(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _remove_unfinished(self) -> None:
        for path in self._unfinished() if peers.is_lead() else []:
            remove_tree(path)

    def _unfinished(self) -> list[epath.Path]:
        """Directories that interrupted saves have left."""
        found = list(self.directory.iterdir()) if self.directory.is_dir() else []
        if not is_remote(self.directory):
            return [path for path in found if _UNFINISHED in path.name]
        return [path for path in found if re.fullmatch(r'\d{9,}', path.name)
                and not (path / _COMMITTED).exists() and not (path / _DAMAGED).exists()]

    def _newest_whole(self) -> tuple[int | None, list[int]]:
        """(newest step whose files match its manifest, or None; damaged steps above it)."""
        damaged, problems = [], []
        for step in reversed(self.steps()):
            problems = self._problems(step)
            if not problems:
                return step, damaged
            for problem in problems:
                _LOG.warning('checkpoint of step %d cannot be used: %s', step, problem)
            damaged.append(step)
        if damaged:
            raise UserError(f'none of the {len(damaged)} checkpoints in {self.directory} is whole; the '
                            f'oldest: {problems[0]}. Restore the files from a copy, or delete that directory '
                            f'to begin again from step 0.')
        return None, []

    def _check_whole(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            raise UserError(f'there is no checkpoint of step {step} in {self.directory}; there are: '
                            f'{", ".join(map(str, steps)) or "none"}.')
        if problems := self._problems(step):
            raise UserError(f'checkpoint of step {step} in {self.directory} cannot be used: {problems[0]}')

    def _problems(self, step: int) -> list[str]:
        """What keeps a committed checkpoint from being used."""
        path = self._path(step)
        if problems := storage.find_damage(path):
            return problems
        return [problem] if (problem := _problem_of_state(path, step)) else []

    def _move_aside(self, step: int) -> None:
        path = self._path(step)
        if is_remote(path):      # cannot be renamed; without its commit the directory no longer counts
            write_text_atomic(path / _DAMAGED, '\n'.join(self._problems(step)) + '\n')
            (path / _COMMITTED).unlink()
            _LOG.warning('the damaged checkpoint of step %d is ignored: %s; it can be deleted', step, path)
            return
        target, count = self.directory / f'{step:09d}.damaged', 1
        while target.exists():
            count += 1
            target = self.directory / f'{step:09d}.damaged{count}'
        os.rename(path, target)
        _LOG.warning('moved the damaged checkpoint of step %d to %s; it can be deleted', step, target)


def _problem_of_state(path: epath.Path, step: int) -> str | None:
    """What is wrong with the arrays, seen by reading the smallest of them as a run does that resumes: Orbax
    only warns where it fails to join what its processes wrote."""
    try:
        said = read_leaf(path / 'state', 'step')
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        return f'{path / "state"} cannot be read: {reason_of(error)}'
    if said is not None and said.ndim == 0 and said != step:
        return f'{path} holds the state of step {int(said):,}, not of {step:,}: it was renamed'
    return None
