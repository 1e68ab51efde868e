"""Aspect-ratio buckets: a few shapes to which images are cropped, so that little of each image is lost.

As in PixArt, all shapes have about the same area, with ratios from 1:4 to 4:1. The table follows from a base
size S (the side of the square shape) and a multiple m of pixels (that the VAE and the patches need):

    step     the largest multiple of m that divides S and is at most S/16; m if there is none
    shapes   for every height H, a multiple of `step` from S/2 to 2S: the width, a multiple of `step`, that
             gives the area nearest to S² (the wider of two); and the transposed shape (W, H)
    order    by H / W, the widest first

For S = 512 and m = 16 the step is 32 and there are 33 shapes, 256 x 1024 to 1024 x 256, with areas within
5.5 % of 512²; for S = 1024 they are twice as large. Images belong to the nearest log ratio."""
import math
from collections.abc import Sequence

import numpy as np

from lit_jax.runtime.errors import UserError

RULE = 'cover-center-crop'  # name of `lit_jax.data.crop.cover_crop` in descriptions of data
_STEPS = 16                 # of the table per base size


def check_sides(size: int, multiple: int, name: str = 'image_size') -> None:
    """Raises UserError with the nearest valid sides unless `size` is a positive multiple of `multiple`."""
    if size < 1 or size % multiple:
        below, above = size // multiple * multiple, (size // multiple + 1) * multiple
        near = f'{below} and {above}' if below > 0 else f'{multiple}'
        raise UserError(f'{name}={size} does not fit: sides must be multiples of {multiple} (what the VAE '
                        f'and the patches divide them by); the nearest: {near}')


def bucket_table(base: int, multiple: int = 16) -> tuple[tuple[int, int], ...]:
    """The shapes (H, W) of a base size (see above). UserError if it is no multiple of `multiple`."""
    check_sides(base, multiple)
    step = next((step for step in range(base // _STEPS // multiple * multiple, 0, -multiple)
                 if base % step == 0), multiple)
    shapes = set()
    for height in range(math.ceil(base / 2 / step) * step, 2 * base + 1, step):
        width = math.floor(base * base / height / step + 0.5) * step
        if width and max(height, width) <= 4 * min(height, width):
            shapes |= {(height, width), (width, height)}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape)))


def bucket_of(sizes: np.ndarray, table: Sequence[tuple[int, int]]) -> np.ndarray:
    """Index of the nearest shape of each image: (width, height) int [n, 2] -> int32 [n]."""
    width, height = np.asarray(sizes, np.float64).reshape(-1, 2).T
    ratios = np.log([high / wide for high, wide in table])
    order = np.argsort(ratios, kind='stable')
    between = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(between, np.log(height / width), side='left')].astype(np.int32)
