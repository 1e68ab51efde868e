"""Object detectors: the interface, crops of one object, and detections read from a file.

Any object with the two methods of `Detector` can be used: the network of the published numbers
(`mask2former`), stored detections (`StoredDetections`), or an exact detector for rendered images."""
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.json_file import parse_json, read_lines, sealed, unsealed
from lit_jax.runtime.paths import as_path

_LINE = {'image': str, 'detections': [
    {'class': str, 'box': [float], 'confidence?': float, 'color?': str}]}
OUTSIDE = '#999'      # colour of everything that is not the object


class Pixels(NamedTuple):
    """name: relative to the scored folder, as 00012/samples/0003.png; image: uint8 RGB [H, W, 3]."""
    name: str
    image: np.ndarray


class Detection(NamedTuple):
    """One object. box: left, top, right, bottom in pixels, y downwards. mask: bool [H, W]."""
    class_name: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0
    mask: np.ndarray | None = None
    colour: str | None = None


class Detector(Protocol):
    def detect(self, image: Pixels) -> Sequence[Detection]:
        """All objects in an image, of all classes, in any order; thresholds are applied by the scoring."""

    def colours(self, image: Pixels, detections: Sequence[Detection], class_name: str) -> Sequence[str]:
        """The colour of each of these objects of one class: one of `prompts.COLOURS`, or another word."""


def cut_out(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The box of an object, uint8 [h, w, 3], rounded to whole pixels, with #999 outside its mask."""
    pixels = Image.fromarray(image)
    if detection.mask is not None:
        if detection.mask.shape != image.shape[:2]:
            raise UserError(f'the mask of a {detection.class_name} has shape {detection.mask.shape}, its '
                            f'image {image.shape[:2]}; the detector must give masks of the image size')
        blank = Image.new('RGB', pixels.size, OUTSIDE)
        pixels = Image.composite(pixels, blank, Image.fromarray(np.asarray(detection.mask, bool)))
    left, top, right, bottom = (round(float(value)) for value in detection.box)
    return np.asarray(pixels.crop((left, top, max(right, left + 1), max(bottom, top + 1))))


class StoredDetections:
    """Detections from a file with one JSON object per line and image, see `store_detections`:

        {"image": "00000/samples/0000.png",
         "detections": [{"class": "cat", "box": [0, 0, 9, 9], "confidence": 0.9}]}

    "color" is also needed for classes of which a prompt asks for the colour."""

    def __init__(self, path):
        self._path = as_path(path)
        if not self._path.is_file():
            raise UserError(f'{path} does not exist; give a file of detections, one JSON object per line')
        self._found = {}
        for number, line in enumerate(read_lines(self._path), 1):
            if line.strip():
                name, detections = _read_line(line, f'{path}, line {number}')
                self._found[name] = detections

    def detect(self, image: Pixels) -> list[Detection]:
        if image.name not in self._found:
            raise UserError(f'{self._path} has no detections of {image.name}; find them in the same folder '
                            'of images')
        return self._found[image.name]

    def colours(self, image: Pixels, detections: Sequence[Detection], class_name: str) -> list[str]:
        if any(detection.colour is None for detection in detections):
            raise UserError(f'{self._path} lacks the colour of a {class_name} in {image.name}; add "color" '
                            'to these detections')
        return [detection.colour for detection in detections]


def detection_line(name: str, detections: Sequence[Detection]) -> str:
    """The line of an image in a file of detections; masks are left out."""
    entries = []
    for found in detections:
        entry = {'class': found.class_name, 'box': [float(x) for x in found.box],
                 'confidence': float(found.confidence)}
        entries.append(entry if found.colour is None else entry | {'color': found.colour})
    return json.dumps(sealed({'image': name, 'detections': entries})) + '\n'


def _read_line(line: str, where: str) -> tuple[str, list[Detection]]:
    try:
        entry = unsealed(parse_json(line, where, _LINE), where)
        return entry['image'], [_read_detection(found) for found in entry['detections']]
    except ValueError as error:
        raise UserError(f'{where} is not a line of detections ({reason_of(error)}); expected '
                        '{"image": NAME, "detections": [{"class": NAME, "box": [left, top, right, bottom], '
                        '"confidence": 0.9}]}') from error


def _read_detection(found: Mapping) -> Detection:
    box = tuple(float(x) for x in found['box'])
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f'box {shown(list(box))}')
    confidence = 1.0 if found.get('confidence') is None else float(found['confidence'])
    return Detection(found['class'], box, confidence, None, found.get('color'))
