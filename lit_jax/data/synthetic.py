"""Synthetic images of any size, with the element spec of real ones, for tests, benchmarks and first runs.

Each class is a fixed mixture of plane waves per channel; an example is this mixture, shifted by up to a
quarter of the image, at a random strength, plus noise. So the classes can be learned and told apart."""
import functools

import numpy as np

from lit_jax.data.base import Source, Spec, check_index, random_generator

LENGTH = 10_000
SPLITS = ('train', 'held_out')  # the same classes, other examples
_WAVES = 3
_MAX_FREQUENCY = 2.0  # periods across the image: coarse enough for 4x4 images
_NOISE = 0.1


class SyntheticSource(Source):
    """Example i is a function of (seed, split, i). Values are in about [-1, 1]; label = i mod classes."""

    def __init__(self, spec: Spec, *, split: str = 'train', seed: int = 0, length: int = LENGTH):
        super().__init__(spec)
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r}')
        self._seed, self._stream, self._length = seed, f'synthetic {split}', length
        self._axis = 2 * np.pi * np.arange(spec.image_size, dtype=np.float32) / spec.image_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        check_index(index, self._length)
        label = index % self.spec.num_classes
        rng = random_generator(self._seed, self._stream, index)
        shift_y, shift_x, strength = rng.random(3, dtype=np.float32) * np.float32([0.25, 0.25, 0.4])
        image = (0.8 + strength) * self._pattern(label, 2 * np.pi * shift_y, 2 * np.pi * shift_x)
        image += _NOISE * rng.standard_normal(self.spec.image_shape, dtype=np.float32)
        return {'image': image, 'label': np.int32(label)}

    def _pattern(self, label: int, shift_y: float, shift_x: float) -> np.ndarray:
        """The waves of a class, float32 [H, W, C], shifted (in radians of one period)."""
        frequency, phase, mix = _class_waves(label, self.spec.channels)
        y = np.outer(self._axis + np.float32(shift_y), frequency[0]) + phase
        x = np.outer(self._axis + np.float32(shift_x), frequency[1])
        # sin(y + x) from one-dimensional tables: H + W sines per wave instead of H · W.
        waves = np.sin(y)[:, None, :] * np.cos(x)[None] + np.cos(y)[:, None, :] * np.sin(x)[None]
        return waves @ mix


@functools.lru_cache(maxsize=4096)
def _class_waves(label: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frequencies [2, waves], phases [waves], mix [waves, C]) of a class, for all seeds and splits."""
    rng = random_generator(0, 'synthetic classes', label)
    frequency = rng.uniform(-_MAX_FREQUENCY, _MAX_FREQUENCY, (2, _WAVES)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, _WAVES).astype(np.float32)
    mix = rng.uniform(-1, 1, (_WAVES, channels)).astype(np.float32)
    return frequency, phase, mix / np.abs(mix).sum(axis=0)  # every channel stays within [-1, 1]
