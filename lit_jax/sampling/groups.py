"""Numbered images of one model, the same bits on any number of devices (`lit_jax.runtime.device_groups`).

Image i is row i mod G of group i div G."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import Model
from lit_jax.runtime.device_groups import DeviceGroups
from lit_jax.sampling.program import build_draw

GROUP = 16


@dataclass(frozen=True)
class Images:
    """What to draw: image i has the noise of (seeds[i], numbers[i]) and shows row i of `cond`.
    cond: arrays [N, ...], as the model function takes them (`lit_jax.sampling.program.build_sampler`)."""
    seeds: np.ndarray
    numbers: np.ndarray
    cond: Mapping[str, np.ndarray]

    @classmethod
    def of_classes(cls, labels: Sequence[int], seed: int) -> 'Images':
        """Image i of class labels[i], all of one seed."""
        labels = np.asarray(labels, np.int32)
        return cls(np.full(len(labels), seed, np.uint32), np.arange(len(labels), dtype=np.uint32),
                   {'label': labels})

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, rows: np.ndarray) -> 'Images':
        return Images(self.seeds[rows], self.numbers[rows],
                      {name: value[rows] for name, value in self.cond.items()})

    def rows(self, indices) -> dict:
        """These images as a tree of arrays."""
        return {'seed': self.seeds[indices], 'number': self.numbers[indices],
                'cond': {name: value[indices] for name, value in self.cond.items()}}


class GroupSampler:
    """Draws numbered images of one model; image i depends on its row of `images` and the settings only.

    vae: `lit_jax.checkpoint.vae_folder.Vae` that decodes latents; None returns what the model draws.
    group: images computed together; affects rounding. devices: of this process; default all.
    size: (H, W) of what the model draws, where it is not the architecture's own.
    on_step: see `lit_jax.sampling.program.build_sampler`."""

    def __init__(self, model: Model, settings: SamplerSettings, images: Images, *, group: int = GROUP,
                 vae=None, size: tuple[int, int] | None = None, devices: Sequence | None = None,
                 on_step: Callable | None = None):
        self.images, self.group = images, min(group, len(images))
        self._vae_params = None if vae is None else vae.params
        draw = build_draw(model.network, settings, model.config, vae=vae, size=size, on_step=on_step)
        self._groups = DeviceGroups(draw, None, self.group, devices=devices,
                                    options=model.network.inference_options())
        self.replace_weights(model.params)

    def replace_weights(self, params: dict | None) -> None:
        """Other weights of the same network for the compiled program; None frees their memory."""
        self._groups.place(None if params is None else (params, self._vae_params))

    def compile(self, params) -> jax.stages.Compiled:
        """The program for weights like `params` (jax.ShapeDtypeStruct); drawing later uses it."""
        return self._groups.compile((params, self._vae_params), self._rows(range(self.devices)))

    def replace_images(self, images: Images) -> None:
        """Other images for the compiled program; at least as many as a group has."""
        if len(images) < self.group:
            raise ValueError(f'{len(images)} images for a program that draws {self.group} at once')
        self.images = images

    @property
    def count(self) -> int:
        return -(-len(self.images) // self.group)

    @property
    def devices(self) -> int:
        return self._groups.devices

    def numbers(self, group: int) -> np.ndarray:
        """Numbers of the images of a group; the last group may be smaller."""
        return np.arange(group * self.group, min((group + 1) * self.group, len(self.images)))

    def draw(self, groups: Sequence[int], batch_size: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(group, its images float32 [n, H, W, C]) in the order given.
        batch_size: images in flight over all devices, at least a group per device; default two groups per
            device, so that none waits while images are fetched. Changes speed and memory, never an image."""
        waves = [groups[start:start + self.devices] for start in range(0, len(groups), self.devices)]
        for wave, images in self._groups.run(waves, self._rows, batch_size):
            for position, group in enumerate(wave):
                first = position * self.group
                yield group, images[first:first + len(self.numbers(group))]

    def _rows(self, wave: Sequence[int]) -> dict:
        """The rows of some groups; one that is not full is filled with the first images."""
        indices = (np.asarray(wave)[:, None] * self.group + np.arange(self.group)).reshape(-1)
        return self.images.rows(indices % len(self.images))
