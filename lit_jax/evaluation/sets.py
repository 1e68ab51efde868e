"""Sets of images to score: an .npz for ADM's evaluator, or a folder of PNG files, read a block at a time.

A set has `count`, `shape` (H, W), `labels` (int [count] or None), `card` (the recipe card of sample.py, or
None), `sha256` of its content, and `blocks(ranges)`: uint8 [n, H, W, 3] for each range of indices.
"""
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from lit_jax.data.images import decode
from lit_jax.evaluation.npz_reader import Npz
from lit_jax.metrics.features import check_images
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, explain_unreachable, file_sha256, files_under

IMAGES = 'arr_0'
_LOSSY = frozenset('.jpg .jpeg .jpe .jfif .webp .avif .gif'.split())
_NUMBER_AND_CLASS = re.compile(r'^\d+_class(\d+)\.png$')     # as sample.py names single images


def open_set(path) -> 'NpzSet | FolderSet':
    """The set at `path`. UserError if it cannot be scored; its pixels are not checked yet."""
    path = as_path(path)
    with explain_unreachable(path):
        if path.is_dir():
            return FolderSet(path)
        if not path.exists():
            raise UserError(f'{path} does not exist; expected an .npz of images or a folder of PNG files '
                            '(python sample.py --from MODEL --count 50000 --out set.npz)')
        if path.suffix != '.npz':
            raise UserError(f'{path} is not known; expected an .npz of images (arr_0 uint8 [N, H, W, 3]) or '
                            f'a folder of PNG files')
        return NpzSet(path)


class NpzSet:
    """`arr_0` of an .npz; `arr_1`, if present, contains the labels."""

    def __init__(self, path):
        self.path = as_path(path)
        with Npz(self.path) as file:
            if IMAGES not in file.names:
                raise UserError(f'{self.path} contains no images: expected {IMAGES}, uint8 [N, H, W, 3]; it '
                                f'has {", ".join(file.names) or "no arrays"}')
            header = file.header(IMAGES)
            check_images(header.shape, header.dtype, f'{self.path}: {IMAGES}')
            if not header.shape[0]:
                raise UserError(f'{self.path}: {IMAGES} is empty; expected at least one image')
            self.count, self.shape = header.shape[0], header.shape[1:3]
            self.labels = self._read_labels(file)
        self.card = _card_of(self.path.with_suffix('.json'), self.count, self.path)
        self._sha256 = None

    @property
    def sha256(self) -> str:
        """Of the whole file."""
        self._sha256 = self._sha256 or file_sha256(self.path)
        return self._sha256

    def blocks(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        with Npz(self.path) as file:
            yield from file.rows(IMAGES, ranges)

    def _read_labels(self, file: Npz) -> np.ndarray | None:
        if 'arr_1' not in file.names:
            return None
        labels = file.array('arr_1')
        return labels if labels.shape == (self.count,) and labels.dtype.kind in 'iu' else None


class FolderSet:
    """The PNG files directly in a folder, in the order of their names; files of other kinds are ignored."""

    def __init__(self, path):
        self.path = as_path(path)
        names = [name for name in files_under(self.path) if '/' not in name and not name.startswith('.')]
        if lossy := [name for name in names if _suffix(name) in _LOSSY]:
            raise UserError(f'{self.path} contains {len(lossy)} images in lossy formats ({lossy[0]}, ...), '
                            f'whose artefacts change the scores. Save samples as PNG or .npz (python '
                            f'sample.py --out NAME.npz); make a reference of real images with: python '
                            f'evaluate.py reference --data=folder --path={self.path} ...')
        self.names = sorted(name for name in names if _suffix(name) == '.png')
        if not self.names:
            raise UserError(f'there are no PNG files in {self.path}; expected at least one')
        self.count = len(self.names)
        self.shape = _image(self.path / self.names[0]).shape[:2]
        found = [_NUMBER_AND_CLASS.match(name) for name in self.names]
        self.labels = np.array([int(match[1]) for match in found]) if all(found) else None
        self.card = _card_of(self.path / 'card.json', self.count, self.path)
        self._sha256 = None

    @property
    def sha256(self) -> str:
        """Of the names and contents of the files; also checks that all images have one size."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name in self.names:
                data = (self.path / name).read_bytes()
                self._check_size(name, _size(data, self.path / name))
                digest.update(name.encode() + b'\0' + hashlib.sha256(data).digest())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def blocks(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        for wanted in ranges:
            images = [_image(self.path / self.names[i]) for i in wanted]
            for i, image in zip(wanted, images, strict=True):
                self._check_size(self.names[i], image.shape[:2])
            yield np.stack(images)

    def _check_size(self, name: str, shape: tuple[int, int]) -> None:
        if tuple(shape) != tuple(self.shape):
            raise UserError(f'{self.path / name} has {shape[1]}x{shape[0]} pixels, {self.names[0]} has '
                            f'{self.shape[1]}x{self.shape[0]}; all images of a set must have the same size')


class FirstOf:
    """The first `count` images of a set."""

    def __init__(self, whole, count: int):
        self.path, self.shape, self.card, self.count = whole.path, whole.shape, whole.card, count
        self.labels = None if whole.labels is None else whole.labels[:count]
        self._whole = whole

    @property
    def sha256(self) -> str:
        return self._whole.sha256

    def blocks(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        return self._whole.blocks(ranges)


def _card_of(path, count: int, where) -> dict | None:
    """The recipe card beside a set, if sample.py wrote one."""
    try:
        card = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(card, dict) or card.get('kind') != 'pictures':
        return None
    if (drawn := card['pictures'].get('count', count)) != count:      # cards of prompts do not count
        raise UserError(f'{path} is the card of {drawn} images, but {where} contains {count}: images are '
                        f'missing, or the card is of another set. Draw the set again, or delete the card')
    return card


def _suffix(name: str) -> str:
    return '.' + name.rpartition('.')[2].lower()


def _image(path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    try:
        return np.asarray(decode(path.read_bytes()))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def _size(data: bytes, path) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} is not a PNG file that can be read: {error}') from error
