"""A subset of the classes of a data set: `data.classes` of a recipe, `--classes` of prepare_latents.py.

A list of classes is a text file with one class name per line (ImageNet: WordNet ids, folders: subfolder
names). Classes are numbered 0, 1, ... in the order of the list; examples keep their order.

`sub_imagenet` is sub_imagenet.txt beside this file: 100 classes of ImageNet for the settings of the DyDi-LiT
paper, which does not publish its own. They are, sorted, the labels
`numpy.random.default_rng(0).choice(1000, 100, replace=False)` in the order of WordNet ids.

Examples are selected by label, without decoding. Folders and prepared latents know their labels; of a tfds
data set every record is read once, and its labels are cached."""
import collections
import hashlib
import os
from pathlib import Path

import numpy as np

from lit_jax.data.base import Source, Spec, check_index
from lit_jax.data.images import ImageSource
from lit_jax.data.same_names import match_names
from lit_jax.runtime.errors import UserError, shown_name
from lit_jax.runtime.json_file import read_lines

LISTS = {'sub_imagenet': Path(__file__).with_name('sub_imagenet.txt')}


def class_list(classes: str) -> tuple[str, ...]:
    """The names in a list, given by a key of LISTS or the path of a text file. UserError if it is none."""
    path = LISTS.get(classes) or Path(os.path.expanduser(classes))
    try:
        names = tuple(line.strip() for line in read_lines(path) if line.strip())
    except UserError as error:
        raise UserError(f'data.classes={classes} is neither a list of lit_jax ({", ".join(LISTS)}) nor a '
                        f'text file with one class a line: {error}') from error
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f'{path} names {", ".join(map(shown_name, twice[:5]))} more than once')
    if not names:
        raise UserError(f'{path} names no class')
    return names


def choose_classes(source: Source, classes: str, num_classes: int | None = None) -> Source:
    """The examples of a source with the listed classes; the source itself if it has just these.

    num_classes: the recipe's number, None for any.
    Raises UserError for a class that the source does not have, and for another number of classes."""
    names = class_list(classes)
    if num_classes not in (None, len(names)):
        raise UserError(f'data.classes={classes} names {len(names)} classes, the recipe asks for '
                        f'{num_classes}; set --config.data.num_classes={len(names)}')
    number = {name: label for label, name in enumerate(source.class_names)}
    own = match_names(names, number)
    if missing := [name for name in names if name not in own]:
        raise UserError(f'data.classes={classes} names {len(missing)} classes that the data set does not '
                        f'have ({", ".join(map(shown_name, missing[:5]))}, ...); its {len(number)} classes: '
                        f'{", ".join(map(shown_name, list(number)[:5]))}, ...')
    names = tuple(own[name] for name in names)
    if tuple(source.class_names) == names:
        return source
    old = np.array([number[name] for name in names])
    new_of = np.full(len(number), -1, np.int32)
    new_of[old] = np.arange(len(names), dtype=np.int32)
    labels = np.asarray(source.all_labels())
    indices = np.flatnonzero(new_of[labels] >= 0)
    if not len(indices):
        raise UserError(f'the data set has no example of the {len(names)} classes of data.classes={classes}')
    subset = _ImageSubset if isinstance(source, ImageSource) else _Subset
    return subset(source, names, indices, new_of[labels[indices]])


def list_digest(names: tuple[str, ...]) -> str:
    """A digest of a list of classes, for descriptions of the data."""
    return hashlib.sha256('\n'.join(names).encode()).hexdigest()


class _Subset(Source):
    """Examples `indices` of a source with new labels."""

    def __init__(self, source: Source, names: tuple[str, ...], indices: np.ndarray, labels: np.ndarray,
                 **options):
        super().__init__(Spec(source.spec.image_size, source.spec.channels, len(names), names), **options)
        self.source, self.indices, self._labels = source, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        index = check_index(int(index), len(self))
        return {**self.source[int(self.indices[index])], 'label': self._labels[index]}

    def take(self, indices) -> dict[str, np.ndarray]:
        indices = np.array([check_index(int(index), len(self)) for index in indices], np.int64)
        return {**self.source.take(self.indices[indices]), 'label': self._labels[indices]}

    def all_labels(self) -> np.ndarray:
        return self._labels

    @property
    def metadata(self) -> dict:
        """Metadata of cached latents, with the remaining classes."""
        return {**self.source.metadata, 'classes': self.class_names, 'count': len(self)}

    @property
    def identity(self) -> dict:
        names = self.spec.class_names
        return {**self.source.identity, 'count': len(self), 'classes': len(names),
                'class_list': list_digest(names)}


class _ImageSubset(_Subset, ImageSource):
    """The same for encoded images: a damaged one is replaced by the next of the subset."""

    __getitem__, take = ImageSource.__getitem__, ImageSource.take

    def __init__(self, source: ImageSource, *chosen):
        super().__init__(source, *chosen, strict=source.strict)

    def read(self, index: int) -> tuple[bytes, int, str]:
        data, _, name = self.source.read(int(self.indices[index]))
        return data, int(self._labels[index]), name
