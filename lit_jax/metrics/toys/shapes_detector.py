"""An exact detector of rendered shapes (lit_jax/data/toys/shapes.py), as one of GenEval's detectors.

Pixels unlike the background form connected parts. A part is an object if it has one colour and overlaps well
with a drawing of a shape, sharp or blurred; the overlap gives its confidence, so that blobs, scraps and
touching objects do not count. numpy and scipy only."""
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from lit_jax.data.toys.shapes import BACKGROUND, NOMINAL, PALETTE, coverage
from lit_jax.data.toys.shapes_words import CLASSES
from lit_jax.metrics.geneval.detector import Detection, Pixels

UNKNOWN = 'unknown'
FOREGROUND = 63       # least distance to the background in uint8 RGB: half of that of the nearest colour
SAME_COLOUR = 55      # most distance to a colour of the palette: half of that between the nearest two
SMALLEST, LARGEST = 5, 17             # side of an object, in pixels of an image of 32
LEAST_FIT, GOOD_FIT = 0.85, 0.88      # overlap with a drawing for confidence 0 and 1
LEAST_PURE, GOOD_PURE = 0.70, 0.92    # share of the inner pixels near their median colour, likewise
MOST_UNEVEN = 1           # most difference of width and height, in pixels of an image of 32
SHARPNESS = (0.5, 0.7, 0.9)           # blurs of drawings, in pixels of 32; the first for images too
_RING = 3                 # pixels around a drawing for its blur


class ShapesDetector:
    """A `Detector` (see lit_jax/metrics/geneval) for images uint8 RGB [H, W, 3] of 18 x 18 pixels or more."""

    def detect(self, pixels: Pixels) -> list[Detection]:
        """The objects with confidence above 0, their masks and colours ('unknown' outside the palette)."""
        image = np.asarray(pixels.image, np.float32)
        away = np.linalg.norm(image - np.float32(BACKGROUND), axis=-1)
        parts, _ = ndimage.label(away > FOREGROUND)
        scale = min(image.shape[:2]) / NOMINAL
        found = (_object(image, parts == number, scale)
                 for number, box in enumerate(ndimage.find_objects(parts), 1)
                 if _plausible(box, scale))
        return [one for one in found if one is not None]

    def colours(self, image: Pixels, detections: Sequence[Detection], class_name: str) -> list[str]:
        return [one.colour or UNKNOWN for one in detections]


def nearest_colour(colour) -> str:
    """The name of the palette colour nearest to uint8 RGB, or 'unknown' if none is near."""
    distances = {name: float(np.linalg.norm(np.subtract(colour, value))) for name, value in PALETTE.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= SAME_COLOUR else UNKNOWN


def _plausible(box: tuple[slice, slice], scale: float) -> bool:
    sides = [side.stop - side.start for side in box]
    return min(sides) >= (SMALLEST - 2) * scale and max(sides) <= LARGEST * scale


def _object(image: np.ndarray, mask: np.ndarray, scale: float) -> Detection | None:
    """The object that a connected part is, or None; mask: bool [H, W]."""
    core = ndimage.binary_erosion(mask)
    if not core.any():
        return None
    pixels = image[core]
    colour = np.median(pixels, axis=0)
    pure = float(np.mean(np.linalg.norm(pixels - colour, axis=-1) <= SAME_COLOUR))
    name, box, fit = _best_drawing(_amount(image, mask, colour), mask, scale)
    confidence = _ramp(fit, LEAST_FIT, GOOD_FIT) * _ramp(pure, LEAST_PURE, GOOD_PURE)
    return Detection(name, box, confidence, mask, nearest_colour(colour)) if confidence > 0 else None


def _amount(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The share of the object's colour against the background in each pixel, [H, W]; 0 far from the mask."""
    direction = colour - np.float32(BACKGROUND)
    amount = np.clip((image - np.float32(BACKGROUND)) @ direction / (direction @ direction), 0, 1)
    return np.where(ndimage.binary_dilation(mask, np.ones((3, 3))), amount, 0)


def _best_drawing(amount: np.ndarray, mask: np.ndarray,
                  scale: float) -> tuple[str, tuple[float, float, float, float], float]:
    """The best (class, box, overlap) of a drawing; overlap = sum of minima / sum of maxima."""
    ring, wide = round(_RING * scale), max(1, round(scale))
    shift = 2 * wide + ring                       # no box near the mask leaves this window
    window = ndimage.gaussian_filter(np.pad(amount, shift), SHARPNESS[0] * scale)
    total, best = window.sum(), ('', (0.0, 0.0, 0.0, 0.0), 0.0)
    for left, top, right, bottom in _boxes_near(mask, wide):
        height, width = bottom - top, right - left
        if abs(height - width) > MOST_UNEVEN * wide or min(height, width) < SMALLEST * scale:
            continue
        drawings, sums = _drawings(height, width, scale)
        inside = window[top + shift - ring:bottom + shift + ring, left + shift - ring:right + shift + ring]
        both = np.minimum(inside, drawings).sum(axis=(1, 2))
        fits = both / (total + sums - both)
        if fits.max() > best[2]:
            name = CLASSES[int(fits.argmax()) // len(SHARPNESS)]
            best = name, (float(left), float(top), float(right), float(bottom)), float(fits.max())
    return best


@functools.lru_cache(maxsize=1024)
def _drawings(height: int, width: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Each class at each sharpness in a ring, float32 [classes * sharpness, h, w], and their sums."""
    ring = round(_RING * scale)
    drawn = np.stack([ndimage.gaussian_filter(np.pad(coverage(name, height, width), ring), blur * scale)
                      for name in CLASSES for blur in SHARPNESS])
    return drawn, drawn.sum(axis=(1, 2))


def _boxes_near(mask: np.ndarray, wide: int):
    """Boxes near a mask: a step out or in on each side, two out at the top, where a triangle is thin."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return itertools.product(range(left - wide, left + wide + 1), range(top - 2 * wide, top + wide + 1),
                             range(right - wide, right + wide + 1), range(bottom - wide, bottom + wide + 1))


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)
