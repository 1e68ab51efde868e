"""One shard of cached latents: written whole or not at all, with a note of its checksum and statistics beside
it.

The note (shards/00000.json) is written after the shard; a shard counts as made if its note is there and the
file has the size in it. What a shard holds is a function of the plan and the images alone, so that any run
can make it.
"""
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lit_jax.data.latents import SHARDS, pack
from lit_jax.runtime.parts import Parts
from lit_jax.runtime.paths import as_path, file_sha256, files_under, fsync_path, is_remote, write_text_atomic

# Latents are noise to a compressor: zstd saves 7 % and costs half of the reading speed.
_WRITER = 'group_size:1,uncompressed'
# a reader keeps every shard open; 1024 files is what systems commonly allow
_MIN_SHARD, _MAX_SHARDS = 512, 512
PARTIAL = '.partial'
# Lists in a note with one entry a record, by the kind of data set: its label; or its bucket, the tokens of
# its captions (long and short, 0: there is none), and how many of these were cut.
FACTS = {'latents': ('labels',), 'caption_latents': ('buckets', 'tokens', 'cut')}


def default_shard_size(count: int) -> int:
    """Images a shard: what an interruption may cost, as long as there are not too many shards."""
    return max(_MIN_SHARD, math.ceil(count / _MAX_SHARDS))


def shard_ranges(plan: dict) -> list[range]:
    """Which examples of the source each shard is made from."""
    shards = Parts(plan['source']['count'], plan['shard_size'])
    return [shards.span(number) for number in shards.parts]


def shard_name(number: int) -> str:
    """Relative to the folder of the data set."""
    return f'{SHARDS}/{number:05d}.array_record'


def note_name(number: int) -> str:
    return f'{SHARDS}/{number:05d}.json'


class ShardWriter:
    """Writes shard `number` into a data set; a context manager: without `commit` nothing stays."""

    def __init__(self, folder, number: int, plan: dict):
        self._folder, self._number, self._dtype = as_path(folder), number, plan['dtype']
        self._target = self._folder / shard_name(number)
        # In a bucket there is no renaming: the shard is made on this machine and goes up in one piece.
        place = tempfile.gettempdir() if is_remote(self._target) else self._target.parent
        self._partial = Path(place, f'.{self._target.name}.{os.getpid()}{PARTIAL}')
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
        """A record of latents with labels, from float32 [2, h, w, 2C] and a label."""
        self.write(pack(moments, label, self._dtype), moments, labels=int(label))

    def write(self, record: bytes, moments: np.ndarray, **facts) -> None:
        """A packed record. moments: float32 [..., 2C] in it; facts: what the note lists of it (FACTS)."""
        self._writer.write(record)
        for name, values in self._facts.items():
            values.append(facts[name])
        mean = moments[..., :moments.shape[-1] // 2].reshape(-1, moments.shape[-1] // 2).astype(np.float64)
        self._sums.append(mean.sum(0))
        self._squares.append(np.square(mean).sum(0))
        self._values += len(mean)
        self._count += 1

    def skip(self, index: int, name: str, reason: str) -> None:
        """Notes an example of the source that could not be decoded."""
        self._bad.append([index, name, reason])

    def commit(self) -> dict:
        """Puts the shard in its place, then its note, which is returned."""
        self._writer.close()
        size = self._partial.stat().st_size
        if (written := count_records(self._partial)) != self._count:
            raise RuntimeError(f'{self._partial} holds {written} records after {self._count} were written')
        # fsum is exact: the same sums whatever the order.
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
        write_text_atomic(self._folder / note_name(self._number), json.dumps(note, indent=1) + '\n')
        return note


def read_note(folder, number: int) -> dict:
    return json.loads((as_path(folder) / note_name(number)).read_bytes())


def missing_shards(folder, plan: dict) -> list[int]:
    """Numbers of the shards that are still to be made."""
    folder = as_path(folder)
    sizes = files_under(folder / SHARDS)
    return [number for number in range(len(shard_ranges(plan))) if not _is_made(folder, number, sizes)]


def _is_made(folder, number: int, sizes: dict[str, int]) -> bool:
    name, note = (text.removeprefix(f'{SHARDS}/') for text in (shard_name(number), note_name(number)))
    if name not in sizes or note not in sizes:
        return False
    try:
        return read_note(folder, number)['bytes'] == sizes[name]
    except (ValueError, LookupError, TypeError):
        return False


def find_shard_damage(folder, number: int) -> str | None:
    """What is wrong with a finished shard, or None. In a bucket its size alone is looked at."""
    path, note = as_path(folder) / shard_name(number), read_note(folder, number)
    if is_remote(path):
        return None if path.stat().length == note['bytes'] else 'its size is not the one that was written'
    if file_sha256(path) != note['sha256']:
        return 'its sha256 is not the one that was written'
    if count_records(path) != note['count']:
        return f'it does not hold {note["count"]} records'
    return None


def discard_shard(folder, number: int) -> None:
    """Makes a shard count as not made."""
    (as_path(folder) / note_name(number)).unlink()


def remove_partial(folder) -> None:
    """Deletes what killed runs left of shards."""
    folder = as_path(folder) / SHARDS
    for name in files_under(folder):
        if name.endswith(PARTIAL):
            (folder / name).unlink(missing_ok=True)


def count_records(path) -> int:
    reader = ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()
