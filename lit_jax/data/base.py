"""What every source of examples is: a length, random access, and a description of one element; and its
randomness."""
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Independent streams of random numbers drawn from one seed.
STREAMS = {'shuffle': 1, 'augment': 2, 'synthetic classes': 3, 'synthetic train': 4, 'synthetic held_out': 5,
           'shapes train': 6, 'shapes held_out': 7, 'shapes prompts': 8, 'shuffle in a bucket': 9,
           'order of buckets': 10}
_INTEGERS = frozenset(('label', 'tokens', 'text_mask'))


@dataclass(frozen=True)
class Spec:
    """One element: 'image' float32 [image_size, image_size, channels] and 'label' int32 in [0, num_classes).

    Cached latents have 'moments' in the place of 'image' (lit_jax/data/latents.py). Where there are captions
    there is no label, and num_classes is 0 (lit_jax/data/captions.py); with buckets image_size is the side
    that they all have the area of.
    """
    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, self.channels


class Source(ABC):
    """Examples by number. The same number gives the same example in every process and every run.

    Attributes:
        buckets: the shapes (H, W) of the images (or latents), where they have several; a batch then holds one
            shape.
        bucket_of: the number of each example's shape, int32 [len]; None where all have one.
    """
    buckets: tuple[tuple[int, int], ...] = ()
    bucket_of: np.ndarray | None = None

    def __init__(self, spec: Spec):
        self.spec = spec

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in label order (JSON-able)."""
        return list(self.spec.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """{'image' (or 'moments'): float32 [H, W, C], 'label': int32}. IndexError outside [0, len)."""

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several examples at once: arrays with a leading axis [b, ...], new and contiguous."""
        return stack([self[int(i)] for i in indices])

    def each(self, indices: Sequence[int]) -> Iterator[dict]:
        """The same examples one by one, for augmentations; their arrays may be written to."""
        batch = self.take(indices)
        for row in range(len(indices)):
            yield {name: array[row] for name, array in batch.items()}

    def all_labels(self) -> np.ndarray:
        """The label of every example, int32 [len]. Sources of dear elements know a shorter way."""
        return np.array([self[index]['label'] for index in range(len(self))], np.int32)


class ArraySource(Source):
    """A small data set held in memory: images float32 [n, H, W, C], labels int32 [n]."""

    def __init__(self, spec: Spec, images: np.ndarray, labels: np.ndarray):
        super().__init__(spec)
        self.images = np.ascontiguousarray(images, np.float32)
        self.labels = np.ascontiguousarray(labels, np.int32)
        if self.images.shape != (len(self.labels), *spec.image_shape):
            raise ValueError(f'{len(self.labels)} labels and images {self.images.shape} do not fit '
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
    """Elements to one batch of contiguous arrays in the dtypes of the contract: labels, tokens and masks are
    int32, all else is float32, except what is kept in bfloat16."""
    return {name: np.stack([np.asarray(e[name], _dtype(name, e[name])) for e in elements])
            for name in elements[0]}


def _dtype(name: str, value):
    if name in _INTEGERS:
        return np.int32
    return value.dtype if getattr(value, 'dtype', None) == ml_dtypes.bfloat16 else np.float32


def check_index(index: int, length: int) -> int:
    """Refuses negative numbers too: a wrong position must not silently become another example."""
    if not 0 <= index < length:
        raise IndexError(f'example {index} of a source of {length}')
    return index


def random_bits(seed: int, stream: str, counter: int) -> np.random.Philox:
    """Counter-based random bits: no state is carried from one counter to the next, so any can be made alone.

    seed, counter: 0 <= n < 2^63. stream: a key of STREAMS.
    """
    return np.random.Philox(key=(STREAMS[stream] << 64) | int(seed), counter=int(counter) << 128)


def random_generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    """A numpy Generator over `random_bits`."""
    return np.random.Generator(random_bits(seed, stream, counter))
