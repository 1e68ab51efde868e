"""Stores features of image sets on disk in parts, so that jobs resume and new scores need no new images.

    OUT/features/0123456789abcdef/card.json                     the images and the feature extractor
                                  000000000-000000128.npy ...   float32 [n, pool and spatial features]
                                  preview.png                   the first images
"""
import hashlib
import json
import math

import numpy as np

from lit_jax.evaluation.spaces import FeatureSpace
from lit_jax.metrics.features import Features
from lit_jax.report.grids import make_grid, save_png
from lit_jax.runtime import storage
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.parts import PartFolder
from lit_jax.runtime.paths import as_path, files_under, make_folder, write_text_atomic
from lit_jax.sampling.stores import part_size

_PREVIEW, _COLUMNS = 64, 8


class FeatureStore(PartFolder):
    """Takes images a part at a time and stores their features, also from `sampling.draw.draw_parts`.

    Args:
        folder: the parent of the sets' folders, shared by all processes.
        images: JSON-able description of the images, equal for equal images in equal order.
        group: images that are drawn together; a part consists of whole groups.
    """

    def __init__(self, folder, space: FeatureSpace, images: dict, count: int, group: int = 1):
        self._space, self._about = space, {'pictures': images, 'features': space.facts, 'count': count}
        self.out = as_path(folder) / fingerprint(self._about)
        super().__init__(self.out, count, part_size(math.lcm(space.group, group)), (sum(space.widths),),
                         np.float32)

    def begin(self) -> bool:
        """Makes the folder; returns False if all features are there already."""
        done = sum(files_under(self.out).values())
        storage.check_free_space(self.out, self.bytes(self.count) - done)
        make_folder(self.out)
        if not (self.out / 'card.json').exists():
            write_text_atomic(self.out / 'card.json', json.dumps(self._about, indent=1) + '\n')
        return bool(self.missing())

    def write(self, part: int, images: np.ndarray) -> None:
        """Features of images uint8 [n, H, W, 1 or 3] of a part."""
        images = np.broadcast_to(images, (*images.shape[:3], 3))
        features = self._space.extract(images)
        rows = np.concatenate([feature for feature in features if feature is not None], axis=1)
        if bad := np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
            raise UserError(f'the features of image {self.span(part)[bad[0]]} and {len(bad) - 1} more of its '
                            f'part are not finite: check the image and the weights of the feature extractor')
        if part == 0:
            save_png(self.out / 'preview.png', make_grid(images[:_PREVIEW], _COLUMNS))
        super().write(part, rows)

    def finish(self) -> None:
        pass     # nothing to join: the parts are what is kept

    def read(self) -> Features:
        """The features of all images, in their order."""
        rows, pool = super().read(), self._space.widths[0]
        return Features(rows[:, :pool], rows[:, pool:] if self._space.widths[1] else None)


def fingerprint(facts) -> str:
    """16 hex digits that identify JSON-able facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
