"""Manifests and checks of free space: folders that are either whole or known to be damaged.

A manifest (`manifest.json`) lists the files of a folder with their sizes and CRC-32 sums, so that a missing,
truncated or altered file is found before it is used; for an object store (gs://...) sizes only."""

import json
import os
import zlib
from pathlib import Path

from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.paths import (
    as_path,
    files_under,
    free_bytes,
    fsync_path,
    full_disk_error,
    is_remote,
    write_text_atomic,
)

MANIFEST = 'manifest.json'
_BLOCK = 1 << 23
_TABLE = {'files': {str: {'bytes': int, 'crc32?': str}}}


def file_crc32(path) -> str:
    """CRC-32 of a file as eight hex digits, read in blocks."""
    crc = 0
    with open(path, 'rb') as f:
        while block := f.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return f'{crc:08x}'


def fsync_tree(root) -> None:
    """`fsync_path` on every file and directory under `root`, and on `root`."""
    for directory, _, files in os.walk(root):
        for name in files:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))


def _files(root, skip: tuple[str, ...] = ()) -> dict[str, int]:
    """{relative path: bytes} of all files except manifests and the names in `skip`."""
    return {name: size for name, size in files_under(root).items()
            if name not in (MANIFEST, *skip) and not name.startswith(f'.{MANIFEST}.')}


def _entry(path, size: int) -> dict:
    """Remote files get no checksum: the store keeps and checks its own."""
    return {'bytes': size} if is_remote(path) else {'bytes': size, 'crc32': file_crc32(path)}


def _render(files: dict[str, dict]) -> str:
    # The table's own sum shows damage to the manifest itself.
    crc = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    return json.dumps({'files': files, 'crc32': f'{crc:08x}'}, indent=1, sort_keys=True) + '\n'


def write_manifest(root, skip: tuple[str, ...] = ()) -> None:
    """Writes `root/manifest.json` for the files under `root`, except the relative names in `skip`."""
    root = as_path(root)
    files = {name: _entry(root / name, size) for name, size in _files(root, skip).items()}
    write_text_atomic(root / MANIFEST, _render(files))


def read_manifest(root) -> dict[str, dict] | None:
    """The manifest's file table, or None where it is missing or damaged."""
    try:
        text = (as_path(root) / MANIFEST).read_bytes().decode()
        files = parse_json(text, as_path(root) / MANIFEST, _TABLE)['files']
        return files if text == _render(files) else None
    except (OSError, ValueError):       # UserError and UnicodeDecodeError are ValueErrors
        return None


def add_to_manifest(root, names: tuple[str, ...]) -> None:
    """Adds the files `names` that the manifest does not list yet. A damaged manifest is left alone."""
    root, files = as_path(root), read_manifest(root)
    if files is None or all(name in files for name in names):
        return
    fresh = {name: _entry(root / name, size) for name, size in files_under(root).items()
             if name in names and name not in files}
    if fresh:
        write_text_atomic(root / MANIFEST, _render(files | fresh))


def find_damage(root, *, checksums: bool = True) -> list[str]:
    """One line for each file under `root` that differs from the manifest; files it does not list are ignored.

    checksums: False compares sizes only, as is always done for remote files."""
    root = as_path(root)
    if not (root / MANIFEST).is_file():
        return [f'{root / MANIFEST}: missing']
    files = read_manifest(root)
    if files is None:
        return [f'{root / MANIFEST}: damaged (its content does not match its own checksum)']
    problems, sizes = [], files_under(root)
    for name, entry in files.items():
        path = root / name
        if name not in sizes:
            problems.append(f'{path}: missing')
        elif sizes[name] < 0:
            problems.append(f'{path}: a link that leads to no file')
        elif sizes[name] != entry['bytes']:
            problems.append(f'{path}: {sizes[name]} bytes where {entry["bytes"]} were written')
        elif checksums and 'crc32' in entry and not is_remote(path):
            problems += _content_problem(path, entry['crc32'])
    return problems


def _content_problem(path, written: str) -> list[str]:
    try:
        same = file_crc32(path) == written
    except FileNotFoundError:
        return [f'{path}: missing']
    except OSError as e:
        return [f'{path}: unreadable ({e.strerror})']
    return [] if same else [f'{path}: damaged (checksum differs from the one written with it)']


def check_free_space(path, needed: int) -> None:
    """Raises UserError when the disk that holds (or will hold) `path` has fewer than `needed` bytes free."""
    if not is_remote(path) and free_bytes(path) < needed:
        raise full_disk_error(path, needed, 'checked before writing')
