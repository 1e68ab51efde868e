"""Aspect-ratio buckets: the few shapes that images of all shapes are brought to, so that little of each is
cut off.

The idea is PixArt's: shapes of about the same area with ratios from 1:4 to 4:1. The table here is computed by
a rule, for a base size S (the side of the square one) and sides that are multiples of m pixels (what a VAE
and the patches divide by):

    step     the largest multiple of m that divides S and is at most S/16; m where there is none
    shapes   for every height H, a multiple of `step` from S/2 to 2S, the width that is a multiple of `step`
             and brings the area nearest to S² (of two the wider one); and the mirror image (W, H) of each
    order    by H / W, the widest first

At 512 pixels and m = 16 the step is 32 and there are 33 shapes, from 256 x 1024 to 1024 x 256, whose areas
differ from 512² by 5.5 % at most; at 1024 pixels they are the same, twice as large. An image belongs to the
shape with the nearest ratio, by the logarithm; of two, the wider.
"""
import math
from collections.abc import Sequence

import numpy as np

from lit_jax.runtime.errors import UserError

RULE = 'cover-center-crop'  # what stands for `lit_jax.data.crop.cover_crop` in a description of the data
_STEPS = 16                 # of the table a base size


def check_sides(size: int, multiple: int, name: str = 'image_size') -> None:
    """Raises UserError for a side that is no positive multiple of `multiple`, with the nearest that are."""
    if size < 1 or size % multiple:
        below, above = size // multiple * multiple, (size // multiple + 1) * multiple
        near = f'{below} and {above}' if below > 0 else f'{multiple}'
        raise UserError(f'{name}={size} does not fit: sides must be multiples of {multiple} (what the VAE '
                        f'and the patches divide them by); the nearest: {near}')


def bucket_table(base: int, multiple: int = 16) -> tuple[tuple[int, int], ...]:
    """The shapes (H, W) for a base size; see the top of this file. (base, base) is one of them.

    Raises UserError where `base` is not a multiple of `multiple`."""
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
    """The number of the shape nearest to each image: int [n, 2] of (width, height) -> int32 [n]."""
    width, height = np.asarray(sizes, np.float64).reshape(-1, 2).T
    ratios = np.log([high / wide for high, wide in table])
    order = np.argsort(ratios, kind='stable')
    between = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(between, np.log(height / width), side='left')].astype(np.int32)
