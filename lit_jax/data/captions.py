"""Images with captions: the common part of their sources, and training examples with tokens.

An image has one caption, or a short and a long one. `CaptionedImages` are sources of encoded images (a
folder: lit_jax/data/caption_folder.py, tar shards: lit_jax/data/tar_shards.py), `Captioned` adds tokens to
any source of images with captions, and `choose_caption` picks one of two captions for each position of the
stream. Images are never mirrored: "left of" would become false."""
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lit_jax.data import buckets
from lit_jax.data.base import Source, Spec, check_index, stack
from lit_jax.data.crop import cover_crop
from lit_jax.data.images import BadImage, ImageSource, to_float
from lit_jax.runtime.errors import UserError, shown, shown_name

LOG = logging.getLogger('lit_jax')
LONG_RATIO = 0.6    # share of long captions, as in LiT
# Fields with captions in a JSON record, the first present one is used: ours, those of Hugging Face's
# imagefolder and img2dataset, and of PixArt's own data.
LONG_FIELDS = ('long', 'long_caption', 'sharegpt4v')
SHORT_FIELDS = ('short', 'short_caption', 'caption', 'text', 'prompt')
_SHOWN = 5


class CaptionedImages(ImageSource):
    """Encoded images with captions: {'image': float32 [H, W, 3] in [-1, 1], 'captions': tuple of str}.

    Captions: one, or a short and a long one. A damaged image is replaced by one of the same bucket.

    Args:
        image_size: side of the square crops, or the base size of the buckets.
        sizes: (width, height) of every image, int [n, 2]; needed with `table`.
        table: shapes (H, W) of the buckets; empty: square crops."""

    def __init__(self, image_size: int, *, sizes: np.ndarray | None = None,
                 table: tuple[tuple[int, int], ...] = (), strict: bool = False):
        super().__init__(Spec(image_size, 3, 0, ()), strict=strict)
        if table:
            self.buckets, self.bucket_of = table, buckets.bucket_of(sizes, table)

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """(caption,) or (short, long) of an example, none of them empty."""

    all_labels = Source.all_labels

    def _element(self, pixels: np.ndarray, number: int) -> dict:
        return {'image': to_float(pixels), 'captions': self.captions(number)}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """{'image': float32 [b, H, W, 3]} of examples of one bucket, without captions."""
        return stack([{'image': self[int(index)]['image']} for index in indices])

    def _pixels(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 [H, W, 3] of an example, and its number."""
        data, _, name = self.read(index)
        square = self.bucket_of is None
        shape = self.spec.image_shape[:2] if square else self.buckets[self.bucket_of[index]]
        try:
            return cover_crop(self.decode(data, index, name), shape), index
        except ValueError as error:
            raise BadImage(name, str(error)) from error

    def _from(self, index: int) -> Iterator[int]:
        if self.bucket_of is None:
            return super()._from(index)
        return (number for number in super()._from(index) if self.bucket_of[number] == self.bucket_of[index])


class Captioned(Source):
    """Images with captions as training examples.

    Elements {'image': float32 [H, W, 3], 'tokens': int32 [2, L], 'text_mask': int32 [2, L]}: row 0 is the
    long caption, row 1 the short one; a single caption is in both. `choose_caption` takes one of them.

    Args:
        images: a source of elements {'image', 'captions'} with `captions(index)`.
        tokenizer: `lit_jax.text.tokenizer.Tokenizer`, or anything with its `encode`. length: L."""

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
        return self.images.captions(index)

    @property
    def identity(self) -> dict:
        return self.images.identity

    def _tokens(self, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
        tokens = self._tokenizer.encode(list(captions), self._length)
        if tokens.truncated and not self._cut:
            self._cut = True
            LOG.warning('some captions have more than %d tokens and are cut there, e.g.: %s',
                        self._length, shown(captions[tokens.truncated[0]]))
        return {'tokens': tokens.ids[[-1, 0]], 'text_mask': tokens.mask[[-1, 0]]}


def choose_caption(element: dict, rng: np.random.Generator, long_ratio: float = LONG_RATIO) -> dict:
    """Augmentation: the long caption with probability `long_ratio`, else the short one, by one raw word."""
    return _row(element, int(rng.bit_generator.random_raw() >= long_ratio * 2.0**64))


def long_caption(element: dict, rng: np.random.Generator | None = None) -> dict:
    """Always the long caption, for held-out images."""
    return _row(element, 0)


def _row(element: dict, row: int) -> dict:
    return {name: value[row] if name in ('tokens', 'text', 'text_mask') else value
            for name, value in element.items()}


def record_captions(record: Mapping, plain: str = '') -> tuple[str, ...]:
    """The captions of a JSON record, or (). plain: a text for the short one. ValueError if one is no text."""
    found = []
    for fields in (SHORT_FIELDS, LONG_FIELDS):
        name = next((name for name in fields if record.get(name) is not None), None)
        value = '' if name is None else record[name]
        if not isinstance(value, str):
            raise ValueError(f'"{name}" is {shown(value)}, expected text')
        found.append(value.strip())
    short, long = found[0] or plain.strip(), found[1]
    return tuple(caption for caption in (short, long) if caption)


def has_caption_field(record: Mapping) -> bool:
    return any(record.get(name) is not None for name in (*LONG_FIELDS, *SHORT_FIELDS))


def check_pairs(place, left: int, *, alone: Sequence[str], orphans: Sequence[str], empty: Sequence[str],
                strict: bool) -> None:
    """Logs in one line which files are left out, or refuses the data set.

    Args:
        left: number of pairs. alone: images without caption. orphans: captions without image. empty: texts.
        strict: refuse images without captions and captions without images.
    Raises:
        UserError: strict, or nothing is left."""
    kinds = {'images without a caption': alone, 'captions without an image': orphans, 'empty captions': empty}
    text = '; '.join(f'{len(names)} {kind} ({", ".join(map(shown_name, names[:_SHOWN]))}'
                     f'{", ..." * (len(names) > _SHOWN)})'
                     for kind, names in kinds.items() if names)
    if not left:
        raise UserError(f'{place} has no image with a caption: {text or "it has no images"}. Put a caption '
                        'into a text file with the name of the image (a.jpg, a.txt), or all of them into '
                        'captions.jsonl: {"image": "a.jpg", "caption": "..."}')
    if strict and (alone or orphans):
        raise UserError(f'{place} has {text}. Complete or delete them, or use the {left} images that have '
                        'captions: without strict the others are left out')
    if text:
        LOG.warning('%s: left out %s; %d images with captions are left', place, text, left)
