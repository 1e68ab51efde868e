"""The interface of data sources: a length, random access, a description of an element; and random streams."""
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lit_jax.runtime.errors import UserError

# Independent streams of random numbers from one seed.
STREAMS = {'shuffle': 1, 'augment': 2, 'synthetic classes': 3, 'synthetic train': 4, 'synthetic held_out': 5,
           'shapes train': 6, 'shapes held_out': 7, 'shapes prompts': 8, 'shuffle in a bucket': 9,
           'order of buckets': 10}
_INTEGERS = frozenset(('label', 'tokens', 'text_mask'))


@dataclass(frozen=True)
class Spec:
    """One element: 'image' float32 [image_size, image_size, channels] and 'label' int32 in [0, num_classes).

    Cached latents have 'moments' instead of 'image' (lit_jax/data/latents.py). With captions there is no
    label and num_classes is 0 (lit_jax/data/captions.py); with buckets the shapes' area is image_size²."""
    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.channels


class Source(ABC):
    """Examples by number. A number gives the same example in every process and every run.

    Attributes:
        buckets: the shapes (H, W) of images or latents, if there are several; a batch has one shape.
        bucket_of: index of each example's shape, int32 [len]; None if all have one shape."""
    buckets: tuple[tuple[int, int], ...] = ()
    bucket_of: np.ndarray | None = None

    def __init__(self, spec: Spec):
        self.spec = spec

    @property
    def class_names(self) -> list[str]:
        """Class names in label order (JSON-able)."""
        return list(self.spec.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """{'image' (or 'moments'): float32 [H, W, C], 'label': int32}. IndexError outside [0, len)."""

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several examples as new contiguous arrays [b, ...]."""
        return stack([self[int(i)] for i in indices])

    def each(self, indices: Sequence[int]) -> Iterator[dict]:
        """The same examples one by one, for augmentations, which may write to the arrays."""
        batch = self.take(indices)
        for row in range(len(indices)):
            yield {name: array[row] for name, array in batch.items()}

    def all_labels(self) -> np.ndarray:
        """The label of every example, int32 [len]. Slow sources override this."""
        if not self.spec.num_classes:
            raise UserError('images with captions have no labels')
        return np.array([self[index]['label'] for index in range(len(self))], np.int32)


class ArraySource(Source):
    """A small data set held in memory: images float32 [n, H, W, C], labels int32 [n]."""

    def __init__(self, spec: Spec, images: np.ndarray, labels: np.ndarray):
        super().__init__(spec)
        self.images = np.ascontiguousarray(images, np.float32)
        self.labels = np.ascontiguousarray(labels, np.int32)
        if self.images.shape != (len(self.labels), *spec.image_shape):
            raise ValueError(f'{len(self.labels)} labels and images {self.images.shape}, expected images '
                             f'{spec.image_shape}')
        self.images.setflags(write=False)  # an augmentation that writes in place would change the data set
        self.labels.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {'image': self.images[check_index(index, len(self))], 'label': self.labels[index]}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        indices = np.asarray(indices)
        return {'image': self.images[indices], 'label': self.labels[indices]}

    def all_labels(self) -> np.ndarray:
        return self.labels


def stack(elements: Sequence[dict]) -> dict[str, np.ndarray]:
    """Stacks elements: labels, tokens and masks as int32, the rest as float32, except bfloat16."""
    return {name: np.stack([np.asarray(e[name], _dtype(name, e[name])) for e in elements])
            for name in elements[0]}


def _dtype(name: str, value):
    if name in _INTEGERS:
        return np.int32
    return value.dtype if getattr(value, 'dtype', None) == ml_dtypes.bfloat16 else np.float32


def check_index(index: int, length: int) -> int:
    """Raises IndexError also for negative numbers, which would silently give another example."""
    if not 0 <= index < length:
        raise IndexError(f'example {index} is not in a source of {length}')
    return index


def random_bits(seed: int, stream: str, counter: int) -> np.random.Philox:
    """Independent random bits for each counter. stream: a key of STREAMS; 0 <= seed, counter < 2^63."""
    return np.random.Philox(key=(STREAMS[stream] << 64) | int(seed), counter=int(counter) << 128)


def random_generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    """A numpy Generator with `random_bits`."""
    return np.random.Generator(random_bits(seed, stream, counter))
