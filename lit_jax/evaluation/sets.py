"""Sets of images to score: an .npz for ADM's evaluator, or a folder of PNG files, read a block at a time.

Transparency and EXIF orientation are ignored, as everywhere (`lit_jax.data.crop`).

A set has `count`, `shape` (H, W), `labels` (int [count] or None), `card` (the recipe card of sample.py, or
None), `sha256` of its content, and `blocks(ranges)`: uint8 [n, H, W, 3] for each range of indices.
"""
import collections
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from lit_jax.checkpoint.model_folder import is_model_folder
from lit_jax.checkpoint.workdir import is_workdir
from lit_jax.data.folder import SUFFIXES, suffix_of, visible_files
from lit_jax.data.images import Ignored
from lit_jax.data.latents import METADATA, PREPARATION
from lit_jax.evaluation.table import ROWS
from lit_jax.metrics.features import check_images
from lit_jax.runtime.errors import UserError, shown_name
from lit_jax.runtime.image_errors import DECODE_ERRORS
from lit_jax.runtime.json_file import parse_json, read_json, read_lines
from lit_jax.runtime.npz_reader import Npz, shown_names
from lit_jax.runtime.paths import as_path, explain_unreachable, explain_unreadable, file_sha256
from lit_jax.sampling.card import as_card
from lit_jax.sampling.stores import CARD, LIST

LOG = logging.getLogger('lit_jax')
IMAGES = 'arr_0'
_LOSSY = frozenset('.jpg .jpeg .jpe .jfif .webp .avif .gif'.split())
_NUMBER_AND_CLASS = re.compile(r'^\d+_class(\d{1,9})\.png$')     # as sample.py names single images


def open_set(path) -> 'NpzSet | FolderSet':
    """The set at `path`. UserError if it cannot be scored; its pixels are not checked yet."""
    path = as_path(path)
    with explain_unreachable(path):
        if path.is_dir():
            _check_kind(path)
            return FolderSet(path)
        if not path.exists():
            raise UserError(f'{path} does not exist; expected an .npz of images or a folder of PNG files '
                            '(python sample.py --from MODEL --count 50000 --out set.npz)')
        if path.suffix != '.npz':
            raise UserError(f'{path} is not known; expected an .npz of images (arr_0 uint8 [N, H, W, 3]) or '
                            f'a folder of PNG files')
        return NpzSet(path)


def _check_kind(path) -> None:
    """Raises UserError for a folder of lit_jax that holds something else, maybe with PNG files in it."""
    use = 'expected an .npz of images or a folder of PNG files'
    if is_model_folder(path) or is_workdir(path):
        kind = 'a workdir of train.py' if is_workdir(path) else 'a model folder'
        raise UserError(f'{path} is {kind}, not a set of images; {use}. To score what it draws: evaluate.py '
                        f'--from {path}')
    if (path / METADATA).exists() or (path / PREPARATION).exists():
        raise UserError(f'{path} holds cached latents, not images; {use}')
    if (path / ROWS).exists():
        raise UserError(f'{path} holds the scores and features of evaluate.py, not images; {use}')
    card = read_json(path / CARD, absent=None)
    if isinstance(card, dict) and 'features' in card and card.get('kind') != 'pictures':
        raise UserError(f'{path} holds features of evaluate.py, not images; {use}')


class NpzSet:
    """`arr_0` of an .npz; `arr_1`, if present, contains the labels."""

    def __init__(self, path):
        self.path = as_path(path)
        with Npz(self.path) as file:
            if IMAGES not in file.names:
                raise UserError(f'{self.path} contains no images: expected {IMAGES}, uint8 [N, H, W, 3]; it '
                                f'has {shown_names(file.names)}')
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
    """The PNG files below a folder, in the order of their names; images of other kinds are refused, other
    files and hidden ones ignored."""

    def __init__(self, path):
        self.path = as_path(path)
        names = list(visible_files(self.path))
        kinds = collections.Counter(suffix_of(name) for name in names)
        lossy = [name for name in names if suffix_of(name) in _LOSSY]
        others = [name for name in names if suffix_of(name) in SUFFIXES - _LOSSY - {'.png'}]
        if lossy:
            raise UserError(f'{self.path} contains {len(lossy)} images in lossy formats '
                            f'({shown_name(lossy[0])}, ...), whose artefacts change the scores. Save samples '
                            f'as PNG or .npz (python sample.py --out NAME.npz); make a reference of real '
                            f'images with: python evaluate.py reference --data=folder --path={self.path} ...')
        if others:
            raise UserError(f'{self.path} contains {kinds[".png"]} PNG files and {len(others)} images of '
                            f'other kinds ({shown_name(others[0])}, ...), which would be left out. Save all '
                            f'as PNG, or move the others away')
        self.names = sorted(name for name in names if suffix_of(name) == '.png')
        if not self.names:
            raise UserError(f'there are no PNG files in {self.path}; expected at least one')
        self.count = len(self.names)
        if deep := sum('/' in name for name in self.names):
            LOG.info('%s: %d of the %d images are in its subfolders', self.path, deep, self.count)
        self._ignored = Ignored(self.count)
        self.shape = self._image(0).shape[:2]
        found = [_NUMBER_AND_CLASS.match(name) for name in self.names]
        self.labels = np.array([int(match[1]) for match in found]) if all(found) else None
        self.card = _card_of(self.path / CARD, self.count, self.path)
        self._check_list()
        self._sha256 = None

    @property
    def sha256(self) -> str:
        """Of the names and contents of the files; also checks that all images have one size."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name in self.names:
                with explain_unreadable(self.path / name):
                    data = (self.path / name).read_bytes()
                self._check_size(name, _size(data, self.path / name))
                digest.update(name.encode() + b'\0' + hashlib.sha256(data).digest())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def blocks(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        for wanted in ranges:
            images = [self._image(i) for i in wanted]
            for i, image in zip(wanted, images, strict=True):
                self._check_size(self.names[i], image.shape[:2])
            yield np.stack(images)

    def _image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        path = self.path / self.names[index]
        with explain_unreadable(path):
            data = path.read_bytes()
        try:
            return np.asarray(self._ignored.decode(data, index, str(path)))
        except ValueError as error:
            raise UserError(f'{path} cannot be read: {error}') from error

    def _check_list(self) -> None:
        """Raises UserError if an image is missing that sample.py drew from a prompt."""
        if self.card is None or not (self.path / LIST).exists():
            return
        lines = [parse_json(line, f'line {number} of {self.path / LIST}', {'file': str})
                 for number, line in enumerate(read_lines(self.path / LIST), 1) if line.strip()]
        if missing := sorted({line['file'] for line in lines} - set(self.names)):
            raise UserError(f'{self.path} lacks {len(missing)} images that its {LIST} lists '
                            f'({shown_name(missing[0])}, ...). Draw them again, or delete {LIST} and {CARD}')

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
    if (card := as_card(read_json(path, absent=None), path)) is None:
        return None
    drawn = (card.get('pictures') or {}).get('count', count)      # cards of prompts do not count
    if drawn != count:
        raise UserError(f'{path} is the card of {drawn} images, but {where} contains {count}: images are '
                        f'missing, or the card is of another set. Draw the set again, or delete the card')
    return card


def _size(data: bytes, path) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
            return image.height, image.width
    except DECODE_ERRORS as error:
        raise UserError(f'{path} is not a PNG file that can be read: {shown_name(error)}') from error
