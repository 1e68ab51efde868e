"""Extracts the features for scores from images: the same bits on any devices and for any batch size.

Images go through the network in groups of a fixed size (`lit_jax.runtime.device_groups`). Last bits depend on
the kind of device, and on CPU on the number of threads, as XLA splits one product by it.

    extract = FeatureExtractor(load_inception())
    features = extract.extract(images)            # uint8 [N, H, W, 3], or an iterable of such
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lit_jax.runtime.device_groups import DeviceGroups
from lit_jax.runtime.errors import UserError, shown, shown_name

GROUP = 16


class Features(NamedTuple):
    """float32: pool [N, D]; spatial [N, S], or None if the network has none."""
    pool: np.ndarray
    spatial: np.ndarray | None


class FeatureExtractor:
    """Runs a feature network over images.

    Args:
        inception: `lit_jax.convert.inception_weights.Inception`.
        fn, params: or another network, fn(params, images [B, H, W, C]) -> features [B, D], or a dict with
            'pool' and perhaps 'spatial'. The dtype of the images is not changed.
        devices: of this process, default all.
        group: images computed together; changes the last bits of features."""

    def __init__(self, inception=None, *, fn: Callable | None = None, params=None,
                 devices: Sequence | None = None, group: int = GROUP):
        if (inception is None) == (fn is None):
            raise UserError('FeatureExtractor takes an Inception or a function fn=..., one of the two')
        if group < 1:
            raise UserError(f'group must be at least 1 image, got {group}')
        self.group, self._is_inception = group, fn is None
        options = {}
        if fn is None:
            fn, params = inception.network.features, inception.params
            options = inception.network.inference_options()
        self._groups = DeviceGroups(_taps(fn), params, group, devices=devices, options=options)

    @property
    def devices(self) -> int:
        return self._groups.devices

    def extract(self, images, batch_size: int = 0, progress=None) -> Features:
        """Features of all images, in their order.

        Args:
            images: [N, H, W, C], may be memory-mapped, or an iterable of such arrays of any N. Inception
                takes uint8 RGB; a wrong order of colours is not noticed.
            batch_size: images in flight over all devices; default two groups per device. For speed only.
            progress: its `add(count)` is called as images are done, see `lit_jax.runtime.progress`."""
        pools, spatials = [], []
        for part in self.stream(images, batch_size, progress):
            pools.append(part.pool)
            spatials.append(part.spatial)
        if not pools:
            raise UserError('there are no images to take features of')
        pool = np.concatenate(pools)
        pools.clear()      # so that the peak is one array and a half
        return Features(pool, None if spatials[0] is None else np.concatenate(spatials))

    def stream(self, images, batch_size: int = 0, progress=None) -> Iterator[Features]:
        """As `extract`, part by part, with memory only for images in flight."""
        waves = _regroup(self._checked(images), self._groups.batch)
        for wave, parts in self._groups.run(waves, lambda wave: wave, batch_size):
            if progress is not None:
                progress.add(len(wave))
            yield Features(parts['pool'], parts.get('spatial'))

    def _checked(self, images) -> Iterator[np.ndarray]:
        """The arrays, each checked, all of one size and dtype."""
        parts = [images] if hasattr(images, 'shape') else images
        if not isinstance(parts, Iterable):
            raise UserError('images must be an array [N, H, W, 3] or an iterable of such, got '
                            f'{shown(images)}')
        first = None
        for part in parts:
            part = part if isinstance(part, np.ndarray) else np.asarray(part)
            if self._is_inception:
                check_images(part.shape, part.dtype)
            elif part.ndim != 4:
                raise UserError(f'images must have the shape [N, H, W, C], got {list(part.shape)}')
            first = (part.shape[1:], part.dtype) if first is None else first
            if (part.shape[1:], part.dtype) != first:
                raise UserError(f'images of one set have one size and dtype; the first have {list(first[0])} '
                                f'{first[1]}, later ones {list(part.shape[1:])} {part.dtype}. Resize or crop '
                                'them')
            yield part


def _taps(fn: Callable) -> Callable:
    """`fn` with only the features, by name, in float32."""
    def run(params, images):
        found = fn(params, images)
        found = found if isinstance(found, dict) else {'pool': found}
        return {name: found[name].astype('float32').reshape(len(images), -1) for name in ('pool', 'spatial')
                if name in found}
    return run


def _regroup(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of `parts` in arrays of `size`, the last one perhaps smaller; copies `size` rows at a time."""
    rest: list[np.ndarray] = []
    have = 0
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start:start + size - have]
            rest.append(piece)
            have += len(piece)
            start += len(piece)
            if have == size:
                yield np.concatenate(rest)
                rest, have = [], 0
    if have:
        yield np.concatenate(rest)


def check_images(shape: tuple[int, ...], dtype, what: str = 'images') -> None:
    """Raises UserError unless an array can be uint8 RGB images; `what`: its name in the message."""
    rank = len(shape)
    if rank == 4 and shape[1] == 3 and shape[3] != 3:
        hint = 'The channels are first: save images.transpose(0, 2, 3, 1)'
    elif rank == 3 or rank == 4 and shape[3] == 1:
        hint = 'One image: x[None]. Shades of grey: np.repeat(x, 3, axis=-1), with a last axis of 1'
    elif rank == 4 and shape[3] == 4:
        hint = 'Blend the fourth channel with a background and give red, green, blue'
    elif rank != 4 or shape[3] != 3 or 0 in shape[1:]:
        hint = 'Give RGB images of one size'
    elif np.dtype(dtype) != np.uint8:
        hint = ('Scores are of images as they are saved: round them, np.clip(127.5 * x + 128, 0, '
                '255).astype(np.uint8) for x in [-1, 1]')
    else:
        return
    raise UserError(f'{what}: {shown_name(np.dtype(dtype))} {shown(list(shape))}; expected uint8 '
                    f'[N, H, W, 3], values 0 to 255. {hint}')
