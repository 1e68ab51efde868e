"""Rendered shapes with captions: a text-to-image data set without files, drawn on the fly.

Circles, squares and triangles in six colours on grey, in the six kinds of scenes of GenEval's tasks: one
object, two, several of one kind, its colour, their positions, the colour of each. Objects are in cells of a
three by three grid and on whole pixels; they never touch, so that a detector can be exact."""
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_jax.data.base import Source, Spec, check_index, random_generator
from lit_jax.data.toys.shapes_words import CLASSES, COLOURS, NUMBERS, RELATIONS, pair, phrase

KINDS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
LENGTHS = {'train': 50_000, 'held_out': 2_000}
BACKGROUND = (128, 128, 128)     # 0 to the model
PALETTE = {'red': (200, 20, 40), 'orange': (250, 130, 10), 'yellow': (250, 240, 40), 'green': (25, 150, 50),
           'blue': (30, 60, 220), 'purple': (150, 20, 190)}         # uint8 RGB
PLACES = 3                       # cells of the grid along each side
SMALLEST_IMAGE = 18              # on fewer pixels a triangle looks like a circle
NOMINAL = 32                     # default image size
SMALLEST, LARGEST = 3 / 4, 7 / 8      # side of an object, of that of its cell
CLEAR = 0.4                      # most offset along the other axis, as a share, of a relation in a caption
_FINE = 16              # points per pixel and axis at which coverage is counted


class Shape(NamedTuple):
    """One object with its box, a square of whole pixels."""
    name: str
    colour: str
    left: int
    top: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom; y downwards."""
        return self.left, self.top, self.left + self.size, self.top + self.size


class Scene(NamedTuple):
    """kind: one of KINDS. captions: that of the kind and, if there is more to say, a complete one."""
    kind: str
    shapes: tuple[Shape, ...]
    captions: tuple[str, ...]


class ShapesSource(Source):
    """Example i is a function of (seed, split, i, image_size); nothing is stored. Values are in [-1, 1].

    An element is {'image': float32 [H, W, 3], 'captions': tuple of str}; no labels, so spec.num_classes is 0.
    Raises ValueError for a split not in LENGTHS, and for images below 18 pixels."""

    def __init__(self, *, split: str = 'train', seed: int = 0, image_size: int = NOMINAL,
                 length: int | None = None):
        super().__init__(Spec(image_size, 3, 0, ()))
        if split not in LENGTHS:
            raise ValueError(f'unknown split {split!r}')
        if image_size < SMALLEST_IMAGE:
            raise ValueError(f'images of {image_size} pixels; shapes need {SMALLEST_IMAGE}')
        self._seed, self._stream = seed, f'shapes {split}'
        self._split, self._length = split, LENGTHS[split] if length is None else length

    @property
    def identity(self) -> dict:
        """Description of the data, JSON-able: equal for equal examples."""
        return {'name': 'shapes', 'split': self._split, 'seed': self._seed,
                'image_size': self.spec.image_size, 'count': self._length}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        scene = self.scene(index)
        return {'image': render(scene.shapes, self.spec.image_size), 'captions': scene.captions}

    def scene(self, index: int) -> Scene:
        """The scene of an example. IndexError outside [0, len)."""
        rng = random_generator(self._seed, self._stream, check_index(index, self._length))
        return draw_scene(rng, KINDS[int(rng.integers(len(KINDS)))], self.spec.image_size)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an example, without drawing it."""
        return self.scene(index).captions

    def take_images(self, indices: Sequence[int]) -> np.ndarray:
        """float32 [b, H, W, 3]."""
        images = np.empty((len(indices), *self.spec.image_shape), np.float32)
        for image, index in zip(images, indices, strict=True):
            _draw(image, self.scene(int(index)).shapes)
        return images

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """{'image': float32 [b, H, W, 3]}, without captions."""
        return {'image': self.take_images(indices)}


def draw_scene(rng: np.random.Generator, kind: str, image_size: int = NOMINAL) -> Scene:
    """A random scene of one of KINDS."""
    if kind in ('single_object', 'colors'):
        name, colour = CLASSES[int(rng.integers(len(CLASSES)))], _colours(rng, 1)[0]
        both = phrase(name), phrase(name, colour)
        shapes = place_shapes(rng, (name,), (colour,), image_size)
        return Scene(kind, shapes, both if kind == 'single_object' else both[1:])
    if kind == 'counting':
        return _counting_scene(rng, image_size)
    return _pair_scene(rng, kind, image_size)


def place_shapes(rng: np.random.Generator, names: Sequence[str], colours: Sequence[str],
                 image_size: int = NOMINAL, relation: str = '') -> tuple[Shape, ...]:
    """One to four shapes in the middle of random cells. relation: of the first to the second, if required."""
    count, side = len(names), image_size // PLACES
    margin = (image_size - PLACES * side) // 2
    low, high = math.ceil(SMALLEST * side), math.floor(LARGEST * side)
    while True:
        where_K, size_K = rng.permutation(PLACES ** 2)[:count], rng.integers(low, high + 1, count)
        left_K, top_K = (margin + place_K * side + (side - size_K) // 2
                         for place_K in (where_K % PLACES, where_K // PLACES))
        shapes = tuple(Shape(name, colour, int(left), int(top), int(size))
                       for name, colour, left, top, size in
                       zip(names, colours, left_K, top_K, size_K, strict=True))
        if not relation or clear_relation(*shapes) == relation:
            return shapes


def clear_relation(shape: Shape, other: Shape) -> str:
    """The relation of a shape to another, one of RELATIONS, or '' if none is clearly right."""
    x = shape.left - other.left + (shape.size - other.size) / 2
    y = shape.top - other.top + (shape.size - other.size) / 2
    if abs(y) <= CLEAR * abs(x):
        return 'left of' if x < 0 else 'right of'
    if abs(x) <= CLEAR * abs(y):
        return 'above' if y < 0 else 'below'
    return ''


def render(shapes: Sequence[Shape], image_size: int = NOMINAL) -> np.ndarray:
    """An image of shapes, float32 [H, W, 3] in [-1, 1]."""
    image = np.empty((image_size, image_size, 3), np.float32)
    _draw(image, shapes)
    return image


@functools.lru_cache(maxsize=4096)
def coverage(name: str, height: int, width: int) -> np.ndarray:
    """The share of each pixel of its box that a shape covers, float32 [height, width], read-only."""
    y = (np.arange(height * _FINE) + 0.5)[:, None] / (height * _FINE)
    x = (np.arange(width * _FINE) + 0.5)[None] / (width * _FINE)
    inside = {'circle': (2 * x - 1) ** 2 + (2 * y - 1) ** 2 <= 1, 'square': (x >= 0) & (y >= 0),
              'triangle': np.abs(2 * x - 1) <= y}[name]
    covered = inside.reshape(height, _FINE, width, _FINE).mean(axis=(1, 3)).astype(np.float32)
    covered.setflags(write=False)
    return covered


def _counting_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """Half of the scenes have one colour, and a second caption with it."""
    name, count = CLASSES[int(rng.integers(len(CLASSES)))], int(rng.integers(min(NUMBERS), max(NUMBERS) + 1))
    colours = _colours(rng, count)
    if rng.random() < 0.5:
        colours = colours[:1] * count
    captions = [phrase(name, count=count)] + [phrase(name, colours[0], count)] * (len(set(colours)) == 1)
    return Scene('counting', place_shapes(rng, (name,) * count, colours, image_size), tuple(captions))


def _pair_scene(rng: np.random.Generator, kind: str, image_size: int) -> Scene:
    """Two objects of two classes; for color_attr their colours differ, so that swapping them is wrong."""
    first, second = rng.permutation(len(CLASSES))[:2]
    names = CLASSES[first], CLASSES[second]
    colours = _colours(rng, 2)
    if kind == 'color_attr':
        colours = tuple(COLOURS[i] for i in rng.permutation(len(COLOURS))[:2])
    wanted = RELATIONS[int(rng.integers(len(RELATIONS)))] if kind == 'position' else ''
    shapes = place_shapes(rng, names, colours, image_size, wanted)
    plain = [phrase(name) for name in names]
    coloured = [phrase(*both) for both in zip(names, colours, strict=True)]
    short = pair(*(coloured if kind == 'color_attr' else plain), wanted)
    relation = clear_relation(*shapes)
    return Scene(kind, shapes, (short, pair(*coloured, relation)) if relation else (short,))


def _colours(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    return tuple(COLOURS[i] for i in rng.integers(len(COLOURS), size=count))


def _draw(image: np.ndarray, shapes: Sequence[Shape]) -> None:
    """Draws into float32 [H, W, 3]."""
    image[:] = _value(BACKGROUND)
    for shape in shapes:
        left, top, right, bottom = shape.box
        covered = coverage(shape.name, shape.size, shape.size)[..., None]
        region = image[top:bottom, left:right]
        region += covered * (_value(PALETTE[shape.colour]) - region)


@functools.cache
def _value(colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 RGB as float32 in [-1, 1]."""
    return np.array(colour, np.float32) / 127.5 - 1
