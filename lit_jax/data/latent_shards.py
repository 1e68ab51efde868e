"""A shard of cached latents, written whole or not at all, and its note with checksum and statistics.

A shard is finished if its note (shards/00000.json) exists and the file has the size in it. The content
depends only on the plan and the images, so any run can make a shard."""
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lit_jax.data.latents import SHARDS, pack
from lit_jax.runtime import claim, writers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import read_json, sealed, unsealed
from lit_jax.runtime.parts import Parts
from lit_jax.runtime.paths import as_path, file_sha256, files_under, fsync_path, is_remote, write_text_atomic

# Compression with zstd would save 7 % and halve the reading speed.
_WRITER = 'group_size:1,uncompressed'
# A reader keeps every shard open; systems commonly allow 1024 open files.
_MIN_SHARD, _MAX_SHARDS = 512, 512
PARTIAL = '.partial'
# Lists in a note with one entry per record, by kind of data set: labels; or buckets, tokens of the long and
# short caption (0: none), and how many captions were cut.
FACTS = {'latents': ('labels',), 'caption_latents': ('buckets', 'tokens', 'cut')}


def default_shard_size(count: int) -> int:
    """Images per shard: few, so that little is lost on interruption, but no more than _MAX_SHARDS shards."""
    return max(_MIN_SHARD, math.ceil(count / _MAX_SHARDS))


def shard_ranges(plan: dict) -> list[range]:
    """The examples of the source in each shard."""
    shards = Parts(plan['source']['count'], plan['shard_size'])
    return [shards.span(number) for number in shards.parts]


def shard_name(number: int) -> str:
    """Path relative to the folder of the data set."""
    return f'{SHARDS}/{number:05d}.array_record'


def note_name(number: int) -> str:
    return f'{SHARDS}/{number:05d}.json'


class ShardWriter:
    """Writes shard `number` of a data set. A context manager: without `commit` nothing is kept."""

    def __init__(self, folder, number: int, plan: dict):
        self._folder, self._number, self._dtype = as_path(folder), number, plan['dtype']
        self._target = self._folder / shard_name(number)
        # There is no renaming in a bucket: the shard is made locally and uploaded at once.
        place = tempfile.gettempdir() if is_remote(self._target) else self._target.parent
        self._partial = writers.sibling(Path(place, self._target.name), 'partial')
        self._writer = ArrayRecordWriter(os.fspath(self._partial), _WRITER)
        self._count, self._values, self._bad = 0, 0, []
        self._facts = {name: [] for name in FACTS[plan['kind']]}
        self._sums, self._squares = [], []

    def __enter__(self) -> 'ShardWriter':
        return self

    def __exit__(self, *error) -> None:
        if self._writer.is_open():
            self._writer.close()
        self._partial.unlink(missing_ok=True)

    def add(self, moments: np.ndarray, label: int) -> None:
        """Adds latents with a label: float32 [2, h, w, 2C]."""
        self.write(pack(moments, label, self._dtype), moments, labels=int(label))

    def write(self, record: bytes, moments: np.ndarray, **facts) -> None:
        """Adds a packed record. moments: float32 [..., 2C] in it; facts: its entries in the note (FACTS)."""
        self._writer.write(record)
        for name, values in self._facts.items():
            values.append(facts[name])
        mean = moments[..., :moments.shape[-1] // 2].reshape(-1, moments.shape[-1] // 2).astype(np.float64)
        self._sums.append(mean.sum(0))
        self._squares.append(np.square(mean).sum(0))
        self._values += len(mean)
        self._count += 1

    def skip(self, index: int, name: str, reason: str) -> None:
        """Records in the note an example that could not be decoded."""
        self._bad.append([index, name, reason])

    def commit(self) -> dict:
        """Puts the shard, then its note, in place; returns the note."""
        claim.check()
        self._writer.close()
        size = self._partial.stat().st_size
        if (written := count_records(self._partial)) != self._count:
            raise RuntimeError(f'{self._partial} holds {written} records after {self._count} were written')
        # fsum is exact, so the order does not matter.
        note = {'count': self._count, 'bytes': size, 'sha256': file_sha256(self._partial),
                'values': self._values,
                'sums': [math.fsum(column) for column in zip(*self._sums, strict=True)],
                'squares': [math.fsum(column) for column in zip(*self._squares, strict=True)],
                'bad': self._bad, **self._facts}
        if is_remote(self._target):
            self._target.write_bytes(self._partial.read_bytes())
        else:
            fsync_path(self._partial)
            os.replace(self._partial, self._target)
            fsync_path(self._target.parent)
        write_text_atomic(self._folder / note_name(self._number), json.dumps(sealed(note), indent=1) + '\n')
        return note


def read_note(folder, number: int) -> dict:
    path = as_path(folder) / note_name(number)
    return unsealed(read_json(path, {'count': int, 'bytes': int, 'sha256': str}), path)


def missing_shards(folder, plan: dict) -> list[int]:
    """Numbers of the unfinished shards."""
    folder = as_path(folder)
    sizes = files_under(folder / SHARDS)
    return [number for number in range(len(shard_ranges(plan))) if not _is_made(folder, number, sizes)]


class ShardStore(Parts):
    """The shards of a set as a store for `lit_jax.runtime.parts.make_missing`."""

    def __init__(self, out, plan: dict):
        super().__init__(plan['source']['count'], plan['shard_size'])
        self.out, self._plan = out, plan

    def missing(self) -> list[int]:
        return missing_shards(self.out, self._plan)


def _is_made(folder, number: int, sizes: dict[str, int]) -> bool:
    name, note = (text.removeprefix(f'{SHARDS}/') for text in (shard_name(number), note_name(number)))
    if name not in sizes or note not in sizes:
        return False
    try:
        return read_note(folder, number)['bytes'] == sizes[name]
    except UserError:
        return False


def find_shard_damage(folder, number: int) -> str | None:
    """The damage of a finished shard, or None. In a bucket only the size is checked."""
    path, note = as_path(folder) / shard_name(number), read_note(folder, number)
    if is_remote(path):
        return None if path.stat().length == note['bytes'] else 'its size is not the one that was written'
    if file_sha256(path) != note['sha256']:
        return 'its sha256 is not the one that was written'
    if count_records(path) != note['count']:
        return f'it does not hold {note["count"]} records'
    return None


def discard_shard(folder, number: int) -> None:
    """Marks a shard as unfinished."""
    (as_path(folder) / note_name(number)).unlink()


def remove_partial(folder) -> None:
    """Deletes parts of shards left by interrupted runs."""
    folder = as_path(folder) / SHARDS
    for name in files_under(folder):
        if PARTIAL in name:
            (folder / name).unlink(missing_ok=True)


def count_records(path) -> int:
    reader = ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()
