"""Width and height of images from their headers, without decoding, for aspect-ratio buckets.

Sizes are kept in lit_jax.runtime.paths.cache_folder() until the name, size or time of a file changes."""
import logging
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from lit_jax.data.images import FORMATS, BadImage
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.image_errors import DECODE_ERRORS
from lit_jax.runtime.kept import keep_facts
from lit_jax.runtime.paths import explain_unreachable, explain_unreadable, is_remote
from lit_jax.runtime.read_ahead import read_all

LOG = logging.getLogger('lit_jax')
_THREADS = 16
_SHOWN = 5


def header_size(file) -> tuple[int, int]:
    """(width, height) of an encoded image in a file object; (0, 0) if it is none."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except DECODE_ERRORS:
        return 0, 0


def read_sizes(root, files: list[str]) -> np.ndarray:
    """(width, height) of images below a folder, int32 [n, 2]; (0, 0) for files that are no images."""
    def stat(name: str) -> str:
        return f'{name} {file_version(root / name)}'

    def size(name: str) -> tuple[int, int]:
        with explain_unreadable(root / name), (root / name).open('rb') as file:
            return header_size(file)

    Image.init()
    with explain_unreachable(root):
        facts = '\n'.join((os.fspath(root), *read_all(stat, files, _THREADS)))
        return keep_facts('picture_sizes', facts, '.npy', load=np.load, save=np.save,
                          make=lambda _: np.array(read_all(size, files, _THREADS), np.int32).reshape(-1, 2),
                          fits=lambda sizes: sizes.shape == (len(files), 2))


def file_version(path) -> str:
    """Size and modification time of a file, as far as its file system knows them. UserError without one."""
    if is_remote(path):
        found = path.stat()
        return f'{found.length} {found.mtime}'
    with explain_unreadable(path):
        found = os.stat(path)
    return f'{found.st_size} {found.st_mtime_ns}'


def keep_known(sizes: np.ndarray, name_of: Callable[[int], str], place, strict: bool) -> np.ndarray:
    """Indices of the images of known size; others are left out with a warning, or refused with `strict`."""
    unknown = np.flatnonzero((sizes < 1).any(axis=1))
    if len(unknown):
        names = [name_of(int(i)) for i in unknown[:_SHOWN]]
        if strict:
            raise BadImage(f'{place}: {names[0]}', 'its header does not give its size')
        if len(unknown) == len(sizes):
            raise UserError(f'none of the images of {place} can be decoded, e.g. {names[0]}')
        LOG.warning('%s: left out %d images whose header does not give their size (%s%s)', place,
                    len(unknown), ', '.join(names), ', ...' if len(unknown) > _SHOWN else '')
    return np.flatnonzero((sizes >= 1).all(axis=1))
