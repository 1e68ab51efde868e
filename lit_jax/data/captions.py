"""Images with captions: what the sources of them share, and how they become examples for training.

An image has one caption or two, a short and a long one. `CaptionedImages` are sources of encoded images (a
folder: lit_jax/data/caption_folder.py, tar shards: lit_jax/data/tar_shards.py), `Captioned` gives any source
of images with captions tokens, and `choose_caption` takes one of both captions for each position of the
stream. Images are never mirrored: "left of" would become false.
"""
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lit_jax.data import buckets
from lit_jax.data.base import Source, Spec, check_index, stack
from lit_jax.data.crop import cover_crop
from lit_jax.data.images import BadImage, ImageSource, decode, to_float
from lit_jax.runtime.errors import UserError

LOG = logging.getLogger('lit_jax')
LONG_RATIO = 0.6    # of LiT: 60 % long captions
# The fields of a record (JSON) that hold captions; the first that is there counts. Ours, those of Hugging
# Face's imagefolder and img2dataset, and those of PixArt's own data.
LONG_FIELDS, SHORT_FIELDS = ('long', 'long_caption',
                             'sharegpt4v'), ('short', 'short_caption', 'caption', 'text', 'prompt')
_SHOWN = 5


class CaptionedImages(ImageSource):
    """Encoded images with captions: {'image': float32 [H, W, 3] in [-1, 1], 'captions': tuple of str}.

    Captions: the short one, then the long one where there are two. Damaged images are replaced as in every
    `ImageSource`, by one of the same bucket.

    Args:
        image_size: side of the squares that images are cropped to, or the base size of the buckets.
        sizes: (width, height) of every image, int [n, 2]; needed where `table` is given.
        table: shapes (H, W) of the buckets; empty: all images become squares.
    """

    def __init__(self, image_size: int, *, sizes: np.ndarray | None = None,
                 table: tuple[tuple[int, int], ...] = (), strict: bool = False):
        super().__init__(Spec(image_size, 3, 0, ()), strict=strict)
        if table:
            self.buckets, self.bucket_of = table, buckets.bucket_of(sizes, table)

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """(only caption,) or (short, long) of an example, none of them empty."""

    def all_labels(self) -> np.ndarray:
        raise UserError('images with captions have no labels')

    def _element(self, pixels: np.ndarray, number: int) -> dict:
        return {'image': to_float(pixels), 'captions': self.captions(number)}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """{'image': float32 [b, H, W, 3]} of examples of one bucket; see `captions` for theirs."""
        return stack([{'image': self[int(index)]['image']} for index in indices])

    def _pixels(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 [H, W, 3] of an example, and its number."""
        data, _, name = self.read(index)
        try:
            return cover_crop(decode(data), self.spec.image_shape[:2] if self.bucket_of is None else
                              self.buckets[self.bucket_of[index]]), index
        except ValueError as error:
            raise BadImage(name, str(error)) from error

    def _from(self, index: int) -> Iterator[int]:
        if self.bucket_of is None:
            return super()._from(index)
        return (number for number in super()._from(index) if self.bucket_of[number] == self.bucket_of[index])


class Captioned(Source):
    """Images with captions as examples for training.

    Elements {'image': float32 [H, W, 3], 'tokens': int32 [2, L], 'text_mask': int32 [2, L]}: row 0 is the
    long caption, row 1 the short one; both are the same where there is one. `choose_caption` takes one of
    them.

    Args:
        images: a source of elements {'image', 'captions'} with `captions(index)`.
        tokenizer: `lit_jax.text.tokenizer.Tokenizer`, or what has its `encode`. length: L.
    """

    def __init__(self, images: Source, tokenizer, length: int):
        super().__init__(images.spec)
        self.buckets, self.bucket_of = images.buckets, images.bucket_of
        self.images, self._tokenizer, self._length, self._cut = images, tokenizer, length, False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        element = self.images[check_index(int(index), len(self))]
        return {'image': element['image'], **self._tokens(element['captions'])}

    def each(self, indices: Sequence[int]) -> Iterator[dict]:
        return (self[int(index)] for index in indices)

    def captions(self, index: int) -> tuple[str, ...]:
        """(only caption,) or (short, long)."""
        return self.images.captions(index)

    @property
    def identity(self) -> dict:
        return self.images.identity

    def all_labels(self) -> np.ndarray:
        return self.images.all_labels()

    def _tokens(self, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
        tokens = self._tokenizer.encode(list(captions), self._length)
        if tokens.truncated and not self._cut:
            self._cut = True
            LOG.warning('some captions have more than %d tokens and are cut there, e.g.: %.80s...',
                        self._length, captions[tokens.truncated[0]])
        rows = [-1, 0]
        return {'tokens': tokens.ids[rows], 'text_mask': tokens.mask[rows]}


def choose_caption(element: dict, rng: np.random.Generator, long_ratio: float = LONG_RATIO) -> dict:
    """Augmentation: the long caption with the probability `long_ratio`, else the short one.

    'tokens', 'text' and 'text_mask' of an element lose their first axis. It looks at one raw bit string of
    the generator, as `lit_jax.data.augment.random_flip` does."""
    return _row(element, int(rng.bit_generator.random_raw() >= long_ratio * 2.0**64))


def long_caption(element: dict, rng: np.random.Generator | None = None) -> dict:
    """The long caption, without a choice: for held-out images."""
    return _row(element, 0)


def _row(element: dict, row: int) -> dict:
    return {name: value[row] if name in ('tokens', 'text', 'text_mask') else value
            for name, value in element.items()}


def record_captions(record: Mapping, plain: str = '') -> tuple[str, ...]:
    """The captions in a JSON record; `plain` (a text file) where it holds no short one.

    () where there is none but empty ones. Raises ValueError for a caption that is no text."""
    found = []
    for fields in (SHORT_FIELDS, LONG_FIELDS):
        name = next((name for name in fields if record.get(name) is not None), None)
        value = '' if name is None else record[name]
        if not isinstance(value, str):
            raise ValueError(f'"{name}" is {value!r:.40}, not a text')
        found.append(value.strip())
    short, long = found[0] or plain.strip(), found[1]
    return tuple(caption for caption in (short, long) if caption)


def has_caption_field(record: Mapping) -> bool:
    return any(record.get(name) is not None for name in (*LONG_FIELDS, *SHORT_FIELDS))


def check_pairs(place, left: int, *, alone: Sequence[str], orphans: Sequence[str], empty: Sequence[str],
                strict: bool) -> None:
    """Says what was left out of a data set, in one line, or refuses it.

    Args:
        left: how many images with captions there are. alone: images without a caption. orphans: captions
            without an image. empty: captions without text.
        strict: refuse images without captions and captions without images.
    Raises:
        UserError: strict, or nothing is left."""
    kinds = {'images without a caption': alone, 'captions without an image': orphans, 'empty captions': empty}
    text = '; '.join(f'{len(names)} {kind} '
                     f'({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})'
                     for kind, names in kinds.items() if names)
    if not left:
        raise UserError(f'{place} has no image with a caption: {text or "it has no images"}. A caption '
                        f'stands in a text file of the image\'s name (a.jpg, a.txt), or in captions.jsonl: '
                        f'{{"image": "a.jpg", "caption": "..."}}')
    if strict and (alone or orphans):
        raise UserError(f'{place} has {text}. Complete or delete them, or take the {left} images that have '
                        f'captions: without strict the others are left out')
    if text:
        LOG.warning('%s: left out %s; %d images with captions are left', place, text, left)
