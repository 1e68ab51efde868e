"""Images with captions in tar files, as written by WebDataset and img2dataset; random access, not unpacked.

    shards/00000.tar    000000000.jpg  000000000.txt  000000000.json  000000001.jpg  ...

Members with the same name up to its first dot belong together: an image and its caption in .txt or .json
("short" and "long", or "caption"; see `lit_jax.data.captions`). Names with more dots, as `photo 2.0.png` and
`photo 2.0.txt`, are taken up to their last one, unless they only add to another image (`a.seg.png` beside
`a.jpg`). Others are ignored and counted. Tar files that were joined end to end are read to the last. A tar
file is scanned once; its index is cached until the file's name, size or modification time changes."""
import collections
import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lit_jax.data.captions import CaptionedImages, check_pairs, has_caption_field, record_captions
from lit_jax.data.folder import SUFFIXES, suffix_of
from lit_jax.data.image_sizes import file_version, header_size, keep_known
from lit_jax.data.same_names import match_names
from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.kept import keep_facts
from lit_jax.runtime.paths import explain_unreadable
from lit_jax.runtime.read_ahead import read_all

LOG = logging.getLogger('lit_jax')
_VERSION = 2    # of the cached index
_THREADS = 8
_BLOCK = 512    # of a tar file
_READ = 1 << 20
_NAMES = {'keys': [str], 'alone': [str], 'orphans': [str], 'empty': [str], 'ignored': {str: int}}
# Columns of the table of members; size -1: no such caption.
_IMAGE, _TEXT, _JSON, _SIZE = slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)


@dataclass(frozen=True)
class TarIndex:
    """The content of a tar file.

    Attributes:
        keys: names of the images with captions, in the order of the file.
        table: int64 [n, 8]: offset and size of image, .txt and .json; width and height (0: unknown).
        alone, orphans, empty: keys of images without caption, captions without image, empty captions.
        ignored: how many other members there are, by their endings."""
    keys: list[str]
    table: np.ndarray
    alone: list[str]
    orphans: list[str]
    empty: list[str]
    ignored: dict[str, int]


class TarImages(CaptionedImages):
    """Opened by `open_tar_shards`; examples in the order of the sorted files and of their members."""

    def __init__(self, paths: list[Path], keys: list[str], shard_of: np.ndarray, members: np.ndarray,
                 image_size: int, **options):
        super().__init__(image_size, sizes=members[:, _SIZE], **options)
        self._paths, self._keys, self._shard_of, self._members = paths, keys, shard_of, members

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self._paths[self._shard_of[index]]
        data = self._bytes(path, *self._members[index, _IMAGE].tolist())
        return data, index, f'{path}: {self._keys[index]}'

    def captions(self, index: int) -> tuple[str, ...]:
        path = self._paths[self._shard_of[index]]
        text, record = (self._bytes(path, *self._members[index, part].tolist()) for part in (_TEXT, _JSON))
        return _captions(text, record, f'{path}: {self._keys[index]}')

    @property
    def identity(self) -> dict:
        names = [f'{self._paths[shard].name}/{key}'
                 for shard, key in zip(self._shard_of, self._keys, strict=True)]
        digest = hashlib.sha256('\n'.join(names).encode(errors='surrogateescape') +
                                self._members.astype('<i8').tobytes())
        return {'name': 'captions', 'count': len(self), 'sha256': digest.hexdigest()}

    def _bytes(self, path: Path, offset: int, size: int) -> bytes:
        if size < 0:
            return b''
        with explain_unreadable(path), open(path, 'rb') as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f'{path} is shorter than when it was opened; tar files must not change while '
                            'they are in use')
        return data


def open_tar_shards(paths: list[Path], *, image_size: int, table: tuple = (),
                    strict: bool = False) -> TarImages:
    """The images with captions in local tar files. Arguments as of `CaptionedImages`.

    Raises UserError for a tar file that is damaged, cut off or compressed, or has duplicate members or
    unreadable captions, and if no pair is left; with `strict` also for unpaired images and captions."""
    paths = sorted(paths)
    indices = read_all(index_tar, paths, _THREADS)
    where = paths[0].parent if len(paths) > 1 else paths[0]
    lists = {name: [f'{path.name}: {key}' for path, index in zip(paths, indices, strict=True)
                    for key in getattr(index, name)]
             for name in ('alone', 'orphans', 'empty')}
    keys = list(itertools.chain.from_iterable(index.keys for index in indices))
    if ignored := sum((collections.Counter(index.ignored) for index in indices), collections.Counter()):
        listed = ', '.join(f'{count} {shown_name(kind)}' for kind, count in ignored.most_common(10))
        LOG.info('%s: ignored %d members that are neither images nor captions: %s', where, ignored.total(),
                 listed)
    check_pairs(where, len(keys), **lists, strict=strict)
    members = np.concatenate([index.table for index in indices])
    shard_of = np.repeat(np.arange(len(paths)), [len(index.keys) for index in indices])
    if table:
        known = keep_known(members[:, _SIZE], lambda i: f'{paths[shard_of[i]].name}: {keys[i]}', where,
                           strict)
        keys, members, shard_of = [keys[i] for i in known], members[known], shard_of[known]
    return TarImages(paths, keys, shard_of, members, image_size, table=table, strict=strict)


def tar_files(folder) -> list:
    """The tar files of a folder, sorted; [] for loose images. UserError for both, or compressed files."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith('.'))
    tars = [name for name in names if name.endswith('.tar')]
    loose = [name for name in names if suffix_of(name) in SUFFIXES]
    if tars and loose:
        raise UserError(f'{folder} has both tar shards ({tars[0]}, ...) and loose images ({loose[0]}, ...); '
                        'move one kind away')
    packed = [name for name in names if name.endswith(('.tar.gz', '.tgz', '.tar.zst', '.tar.bz2', '.tar.xz'))]
    if packed and not loose and not tars:
        raise UserError(f'{folder} has compressed tar files ({packed[0]}, ...), which have no random access; '
                        'unpack them to .tar (gunzip)')
    return [folder / name for name in tars]


def index_tar(path: Path) -> TarIndex:
    """The index of a tar file, cached or made by scanning it."""
    path = Path(path).absolute()
    with explain_unreadable(path):
        facts = f'{_VERSION} {path} {file_version(path)}'

    def make(_) -> TarIndex:
        LOG.info('scanning %s once', path)
        return scan_tar(path)

    return keep_facts('tar_shards', facts, '.npz', make=make, load=_load, save=_save, fits=_fits)


def _save(file, index: TarIndex) -> None:
    text = json.dumps({name: getattr(index, name) for name in _NAMES})
    np.savez(file, names=np.frombuffer(text.encode(), np.uint8), table=index.table)


def _load(file) -> TarIndex:
    with np.load(file) as arrays:
        names = parse_json(arrays['names'].tobytes(), 'the index', _NAMES)
        return TarIndex(**names, table=arrays['table'])


def _fits(index: TarIndex) -> bool:
    return index.table.shape == (len(index.keys), 8) and index.table.dtype == np.int64


def scan_tar(path: Path) -> TarIndex:
    """Reads the headers of all members, the captions, and the headers of the images."""
    Image.init()
    groups, ignored = _Groups(path), collections.Counter()
    for name, offset, size in _members(path):
        folder, slash, base = name.removeprefix('./').rpartition('/')
        if base.startswith('.'):
            continue
        if size < 0 or not groups.add(f'{folder}{slash}', base, (offset, size)):
            ignored['link or device' if size < 0 else suffix_of(base) or 'without a suffix'] += 1
    groups.pair()
    return _index(path, groups, ignored)


class _Groups:
    """Images, texts and JSON records of a tar file by key: {key: (offset, size)}."""

    def __init__(self, path: Path):
        self._path = path
        self.images, self.texts, self.records = {}, {}, {}

    def add(self, folder: str, base: str, place: tuple[int, int]) -> bool:
        """Returns whether a member is an image or may be a caption."""
        suffix = suffix_of(base)
        kind = self.images if suffix in SUFFIXES else {'.txt': self.texts, '.json': self.records}.get(suffix)
        if kind is None:
            return False
        key = folder + base[:-len(suffix)]
        if key in kind:
            raise UserError(f'{self._path} has two members {shown(folder + base)}, or two images of that '
                            f'name; names must differ up to their endings. Write it again')
        kind[key] = place
        return True

    def pair(self) -> None:
        """Renames captions whose name looks the same as that of an image."""
        for captions in (self.texts, self.records):
            for key, own in match_names(self.images, captions).items():
                if key != own:
                    captions[key] = captions.pop(own)

    def adds_to_another(self, key: str) -> bool:
        """Whether a key with dots has another image's key up to its first dot."""
        folder, slash, base = key.rpartition('/')
        main, dot, _ = base.partition('.')
        return bool(dot) and f'{folder}{slash}{main}' in self.images


def _index(path: Path, groups: _Groups, ignored: collections.Counter) -> TarIndex:
    keys, rows, empty, alone, orphans = [], [], [], [], []
    images, texts, records = groups.images, groups.texts, groups.records
    with explain_unreadable(path), open(path, 'rb') as file:
        def read(place: tuple[int, int]) -> bytes:
            return os.pread(file.fileno(), place[1], place[0]) if place[1] >= 0 else b''

        for key, image in images.items():
            text, record = (found.get(key, (0, -1)) for found in (texts, records))
            if text[1] < 0 and groups.adds_to_another(key):
                ignored[f'*{suffix_of(key)}.*'] += 1 + (record[1] >= 0)
            elif _captions(read(text), data := read(record), f'{path}: {shown_name(key)}'):
                keys.append(key)
                rows.append((*image, *text, *record, *header_size(_Window(file, *image))))
            elif text[1] >= 0 or data and _tells(data, path, key):
                empty.append(key)
            else:
                alone.append(key)
        for key in dict.fromkeys([*texts, *records]):
            if key in images:
                continue
            # A JSON record alone may belong to anything; a text is a caption.
            if groups.adds_to_another(key) or key not in texts and not _tells(read(records[key]), path, key):
                ignored['.txt' if key in texts else '.json'] += 1
            else:
                orphans.append(key)
    return TarIndex(keys, np.array(rows, np.int64).reshape(-1, 8), alone, orphans, empty, dict(ignored))


def _captions(text: bytes, record: bytes, name: str) -> tuple[str, ...]:
    """The captions of a .txt and a .json, each b'' if absent."""
    fields = _fields(record, f'the caption of {name}')
    try:
        return record_captions(fields, text.decode('utf-8-sig'))
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f'the caption of {name} cannot be read: {reason_of(error)}') from error


def _fields(record: bytes, where: str) -> dict:
    return parse_json(record, where, {}) if record else {}


def _tells(record: bytes, path: Path, key: str) -> bool:
    """Whether a record has a caption field."""
    return has_caption_field(_fields(record, f'{path}: the JSON of {shown_name(key)}'))


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of all members of a tar file, size -1 for those that are no files; what follows an
    end mark is read, too. UserError if it is damaged."""
    try:
        with explain_unreadable(path), open(path, 'rb') as file:
            total, start = os.path.getsize(path), 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode='r:') as tar:
                    while (member := tar.next()) is not None:
                        if member.offset_data + member.size > total:
                            raise tarfile.ReadError(f'{shown_name(member.name)} ends behind the end of the '
                                                    f'file')
                        is_file = member.isreg() and not member.issparse()
                        if is_file or not member.isdir():
                            yield member.name, member.offset_data, member.size if is_file else -1
                        tar.members = []  # frees memory
                    end = tar.offset
                file.seek(end)
                if file.read(_BLOCK) != bytes(_BLOCK):      # tarfile takes any bad header for the end
                    raise tarfile.ReadError(f'there is no end mark at byte {end}')
                start = _after_zeros(file, end + _BLOCK)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f'{path} is damaged, cut off, or no plain tar file ({reason_of(error)}). Copy it '
                        'again; unpack a compressed one (gunzip), as members are read in any '
                        'order') from error
    except OSError as error:
        raise UserError(f'{path} cannot be read: {reason_of(error)}') from error


def _after_zeros(file, start: int) -> int | None:
    """The block, counted from `start`, with the first byte that is not zero; None: there are only zeros."""
    file.seek(start)
    while data := file.read(_READ):
        if rest := len(data.lstrip(b'\0')):
            return start + (len(data) - rest) // _BLOCK * _BLOCK
        start += len(data)
    return None


class _Window(io.RawIOBase):
    """A read-only file object for a part of a file."""

    def __init__(self, file, offset: int, size: int):
        self._fd, self._offset, self._end, self._at = file.fileno(), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence])
        return self._at

    def readinto(self, buffer) -> int:
        data = os.pread(self._fd, max(0, min(len(buffer), self._end - self._at)), self._offset + self._at)
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)
