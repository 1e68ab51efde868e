"""Sources of encoded images: decoding with Pillow, the crop, and the replacement of damaged images.

Damage is found only when an image is read, and reading all of ImageNet first would take an hour. So the next
readable example takes the place of a damaged one, the same in every process and every run. Replaced images
are logged and listed in `ImageSource.bad`; with `strict` the first stops the run. A file that cannot be read
at all (missing, no permission, network) always stops it, as this may differ between hosts and days."""
import hashlib
import io
import itertools
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import ExifTags, Image

from lit_jax.data.base import Source, Spec, check_index
from lit_jax.data.crop import center_crop
from lit_jax.data.label_index import read_labels
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.image_errors import DECODE_ERRORS
from lit_jax.runtime.read_ahead import read_ahead

LOG = logging.getLogger('lit_jax')
TRANSPARENCY, ORIENTATION = 'transparency', 'EXIF orientation'
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF')
_MAX_BAD_IN_A_ROW = 100
_SOME = 16
_MAX_WARNINGS = 20


class BadImage(UserError):
    """An image that cannot be decoded: `name` (file or record) and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(f'{name} cannot be decoded: {reason}')
        self.name, self.reason = name, reason


def decode(data: bytes, ignored: Callable[[str], object] = lambda kind: None) -> Image.Image:
    """The first frame of an encoded image, in RGB; transparency and EXIF orientation are ignored, as in ADM
    (`lit_jax.data.crop`): `ignored` is called with the name of each that the image has.

    Raises ValueError with the reason unless it is a complete image with 8 bits per channel."""
    if not data:
        raise ValueError('it is empty (0 bytes)')
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode[0] in 'IF':  # Pillow would silently clip these to white
            raise ValueError(f'it has more than 8 bits per channel (mode {image.mode}); store it with 8')
        if image.has_transparency_data:
            ignored(TRANSPARENCY)
        if 'exif' in image.info and _is_turned(image):
            ignored(ORIENTATION)
        return image.convert('RGB')
    except Image.UnidentifiedImageError as error:
        raise ValueError(f'it is no image of a known format ({", ".join(FORMATS)})') from error
    except DECODE_ERRORS as error:
        raise ValueError(reason_of(error)) from error


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except DECODE_ERRORS:       # of its EXIF data, which are not needed
        return False


class Ignored:
    """Counts the images of which something is ignored, and says so: at the first, and once `total` were read.
    Thread-safe."""

    def __init__(self, total: int):
        self._total, self._reads, self._lock = total, 0, threading.Lock()
        self._numbers: dict[str, set[int]] = {}
        self._said: dict[str, int] = {}

    def decode(self, data: bytes, number: int, name: str) -> Image.Image:
        """`decode` of image `number`."""
        image = decode(data, lambda kind: self._note(kind, number, name))
        with self._lock:
            self._reads += 1
            last = self._reads == self._total
        if last:
            self.say()
        return image

    def say(self) -> None:
        """Logs how many there are, unless that was said."""
        with self._lock:
            counts = {kind: len(numbers) for kind, numbers in self._numbers.items()}
            new, self._said = counts != self._said, counts
        if new:
            LOG.info('ignored, as everywhere: %s', ', '.join(f'{kind} of {count} images'
                                                             for kind, count in counts.items()))

    def _note(self, kind: str, number: int, name: str) -> None:
        with self._lock:
            first = kind not in self._numbers
            self._numbers.setdefault(kind, set()).add(number)
        if first:
            LOG.info('%s: its %s is ignored, as that of every image; more are counted, not shown', name, kind)


def to_float(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 0..255 -> float32 in [-1, 1]; into `out` if given."""
    out = np.multiply(pixels, np.float32(1 / 127.5), out=out, dtype=np.float32)
    out -= 1
    return out


class ImageSource(Source):
    """Encoded images by number: {'image': float32 [S, S, 3] in [-1, 1], not flipped, 'label': int32}.

    `source[i]` replaces a damaged image, unless `strict`; `source.load(i)` raises BadImage. Thread-safe."""

    def __init__(self, spec: Spec, *, strict: bool = False):
        super().__init__(spec)
        Image.init()  # loads all decoders before threads use them
        self.strict = strict
        self.bad: dict[str, str] = {}  # {name: reason} of the damaged images found so far
        self._bad_numbers: dict[int, BadImage] = {}
        self._ignored: Ignored | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, int, str]:
        """(encoded image, label, name for messages) of example `index`. UserError if it cannot be read."""

    @property
    @abstractmethod
    def identity(self) -> dict:
        """Description of the data, JSON-able: equal for equal examples in equal order, wherever they are."""

    def content(self) -> dict:
        """`identity`, which most know from names and numbers only, with the sha256 of the encoded bytes of up
        to 16 evenly spaced examples as 'some_bytes'."""
        sums = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, _SOME).astype(int)):
            try:
                sums.update(self.read(int(index))[0])
            except UserError:       # said when its turn comes
                continue
        return {**self.identity, 'some_bytes': sums.hexdigest()}

    def all_labels(self) -> np.ndarray:
        """Reads every record once, without decoding, and caches the labels (`lit_jax.data.label_index`)."""
        return read_labels(self.identity, len(self), lambda index: self.read(index)[1])

    def load(self, index: int) -> dict:
        """Example `index` itself. Raises BadImage if it cannot be decoded."""
        return self._element(*self._pixels(check_index(index, len(self))))

    def __getitem__(self, index: int) -> dict:
        return self._element(*self._readable(check_index(index, len(self))))

    def _element(self, pixels: np.ndarray, label: int) -> dict:
        return {'image': to_float(pixels), 'label': np.int32(label)}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        images = np.empty((len(indices), *self.spec.image_shape), np.float32)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(indices):
            pixels, labels[row] = self._readable(check_index(int(index), len(self)))
            to_float(pixels, out=images[row])
        return {'image': images, 'label': labels}

    def _pixels(self, index: int) -> tuple[np.ndarray, int]:
        data, label, name = self.read(index)
        if not 0 <= label < self.spec.num_classes:
            raise UserError(f'{name} has label {label}, outside 0..{self.spec.num_classes - 1}; a split '
                            'without labels cannot be used here')
        try:
            return center_crop(self.decode(data, index, name), self.spec.image_size), label
        except ValueError as error:
            raise BadImage(name, str(error)) from error

    def decode(self, data: bytes, index: int, name: str) -> Image.Image:
        """`decode` of example `index`, counting what is ignored of it."""
        with self._lock:
            self._ignored = self._ignored or Ignored(len(self))
        return self._ignored.decode(data, index, name)

    def say_ignored(self) -> None:
        """Logs what was ignored of the images read so far."""
        if self._ignored is not None:
            self._ignored.say()

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        """Pixels and label of the example, or of the next readable one (cyclic)."""
        for number in itertools.islice(self._from(index), _MAX_BAD_IN_A_ROW):
            if number in self._bad_numbers:
                continue
            try:
                return self._pixels(number)
            except BadImage as error:
                if self.strict:
                    raise
                self._remember(number, error)
        raise UserError(f'no image from example {index} on can be decoded; the first error: '
                        f'{self._bad_numbers[index]}')

    def _from(self, index: int) -> Iterator[int]:
        """The example, then its replacements in the order in which they are tried."""
        return (number % len(self) for number in range(index, index + len(self)))

    def _remember(self, number: int, error: BadImage) -> None:
        with self._lock:
            if number in self._bad_numbers:
                return
            self._bad_numbers[number], self.bad[error.name] = error, error.reason
            count = len(self.bad)
        if count <= _MAX_WARNINGS:
            LOG.warning('%s; the next readable image takes its place%s', error,
                        '. More of these are counted, not shown' if count == _MAX_WARNINGS else '')


def as_told(content: dict, before: Mapping | None) -> dict:
    """`ImageSource.content` to compare with one from before: earlier versions did not tell any bytes."""
    told = 'some_bytes' in (before or {})
    return {name: value for name, value in content.items() if told or name != 'some_bytes'}


def load_or_bad(source: Source, index: int, strict: bool) -> 'dict | BadImage':
    """Example `index` of any source, or its BadImage, which is raised with `strict`."""
    try:
        return source.load(index) if isinstance(source, ImageSource) else source[index]
    except BadImage as error:
        if strict:
            raise
        return error


def find_bad(source: ImageSource, *, threads: int = 1,
             progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """{name: reason} of all damaged images; reads everything. progress: called with (images checked, all)."""
    def look(index: int) -> BadImage | None:
        found = load_or_bad(source, index, strict=False)
        return found if isinstance(found, BadImage) else None

    blocks = [range(start, min(start + 1000, len(source))) for start in range(0, len(source), 1000)]
    found = {}
    for block, looked in zip(blocks, read_ahead(look, blocks, threads), strict=True):
        found |= {bad.name: bad.reason for bad in looked if bad is not None}
        if progress is not None:
            progress(block.stop, len(source))
    return found


def check_asked(name: str, asked: dict, num_classes: int) -> int:
    """The image size that a recipe asks of RGB images with so many classes; UserError if they do not fit."""
    if asked['image_size'] is None:
        raise UserError(f'{name} holds images of any size: say which to crop them to, e.g. '
                        '--config.data.image_size=256')
    if asked['channels'] not in (None, 3):
        raise UserError(f'{name} holds images with 3 channels, the recipe asks for {asked["channels"]}')
    if asked['num_classes'] not in (None, num_classes):
        raise UserError(f'{name} has {num_classes} classes, the recipe asks for {asked["num_classes"]}; set '
                        f'--config.data.num_classes={num_classes}')
    return asked['image_size']
