"""Writes and reads `metrics.jsonl`: one JSON object per line with its step; on a disk or in a bucket."""
import json
import logging
import time
from collections.abc import Mapping

from lit_jax.runtime import json_file
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import (
    as_path,
    explain_unreachable,
    explain_unreadable,
    is_remote,
    write_text_atomic,
)

LOG = logging.getLogger('lit_jax')
REWRITE_SECONDS = 60.0    # a bucket gets the whole file again at most this often


class MetricsLog:
    """The metrics of a run. Opening at `step` drops later records: those steps are repeated.
    A disk gets every line at once. Object stores cannot append, so lines are kept in memory and the object
    is rewritten at most every `rewrite_s` seconds, and at `flush` and `close`; if the bucket does not answer,
    the run continues and the next rewrite has everything. last: the last record kept at opening, or None."""

    def __init__(self, path, step: int, *, rewrite_s: float = REWRITE_SECONDS):
        self._path, self._remote, self._rewrite_s = as_path(path), is_remote(path), rewrite_s
        with explain_unreachable(self._path):
            kept = [record for record in read_lines(self._path) if record['step'] <= step]
        self.last = kept[-1] if kept else None
        self._lines = [json.dumps(record) + '\n' for record in kept]
        self._file, self._dirty, self._written = None, True, time.monotonic()
        if self._remote:
            self.flush()
        else:
            write_text_atomic(self._path, ''.join(self._lines))
            self._file = open(self._path, 'a')

    def write(self, record: Mapping) -> None:
        line = json.dumps(record) + '\n'
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        self._dirty = True
        if time.monotonic() - self._written >= self._rewrite_s:
            self.flush()

    def flush(self) -> None:
        """Writes records that are still in memory. Called before a checkpoint is saved."""
        if not (self._remote and self._dirty):
            return
        self._written = time.monotonic()
        try:
            with explain_unreachable(self._path):
                write_text_atomic(self._path, ''.join(self._lines))
            self._dirty = False
        except UserError as error:
            LOG.warning('%s is behind: %s. The run continues and writes it later.', self._path, error)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def read_lines(path) -> list[dict]:
    """The records of a metrics.jsonl, without lines that are damaged, such as a last one that an interrupted
    run left unfinished."""
    path = as_path(path)
    if not path.exists():
        return []
    records, damaged = [], []
    with explain_unreadable(path):
        lines = path.read_bytes().removesuffix(b'\n').split(b'\n')
    for number, line in enumerate(lines if lines != [b''] else [], 1):
        try:
            records.append(json_file.parse_json(line, f'{path}, line {number}', {'step': int}))
        except UserError as error:
            damaged.append(error)
    if damaged:
        LOG.warning('%s; %s left out', damaged[0],
                    'the line is' if len(damaged) == 1 else f'{len(damaged)} such lines are')
    return records
