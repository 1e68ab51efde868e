"""The same bits on any number of devices: pictures are computed in groups of one fixed size, each on one device.

Matrix products of another shape round differently, so a picture's bits depend on how many are computed together. Here
that number never changes: picture i is row i mod G of group i div G, the program is compiled for G pictures, and every
device of every host runs that program on groups of its own. No device waits for another, and nothing is exchanged.
"""
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.network import Model
from lit_jax.sampling.noise import initial_noise, step_keys
from lit_jax.sampling.program import build_sampler

GROUP = 16
# Not a name of lit_jax.models.partition: inside a group the models see no mesh to lay their activations on.
AXIS = 'groups'


class GroupSampler:
    """Draws numbered pictures of one model; picture i depends on the seed, i, its label and the settings only.

    Args:
        settings: options of `build_sampler` (method, steps, cfg_scale, ...).
        vae: `lit_jax.checkpoint.vae_folder.Vae` that turns latents into pictures; None leaves what the model draws.
        labels: int [N], the class of every picture.
        group: pictures computed together. Part of the result: see above.
        devices: of this process; default all of them.
    """

    def __init__(self, model: Model, settings: dict, labels: Sequence[int], *, seed: int, group: int = GROUP, vae=None,
                 devices: Sequence | None = None):
        self.labels, self.group = np.asarray(labels, np.int32), min(group, len(labels))
        devices = jax.local_devices() if devices is None else devices
        self._mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._vae_params = None if vae is None else vae.params
        self.replace_weights(model.params)
        self._program = jax.jit(
            jax.shard_map(_one_group(model, settings, seed, vae), mesh=self._mesh, in_specs=(P(), P(AXIS), P(AXIS)),
                          out_specs=P(AXIS), check_vma=False),
            compiler_options=model.network.inference_options())

    def replace_weights(self, params: dict | None) -> None:
        """Other weights of the same network, for the program that is compiled already; None gives up their memory."""
        self._weights = None if params is None else jax.device_put((params, self._vae_params), NamedSharding(self._mesh, P()))

    @property
    def count(self) -> int:
        return -(-len(self.labels) // self.group)

    @property
    def devices(self) -> int:
        return self._mesh.size

    def numbers(self, group: int) -> np.ndarray:
        """The numbers of the pictures of a group; the last one may have fewer."""
        return np.arange(group * self.group, min((group + 1) * self.group, len(self.labels)))

    def draw(self, groups: Sequence[int], batch_size: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(group, its pictures float32 [n, H, W, C]) in the order given.

        batch_size: pictures on their way at once, over all devices, at least one group a device; default two groups a
            device, so that none waits while pictures are fetched. Changes speed and memory, never a picture.
        """
        waves = max(1, batch_size // (self.group * self.devices)) if batch_size else 2
        pending = deque()
        for start in range(0, len(groups), self.devices):
            wave = list(groups[start:start + self.devices])
            pending.append((wave, self._start(wave)))
            if len(pending) == waves:
                yield from self._finish(*pending.popleft())
        while pending:
            yield from self._finish(*pending.popleft())

    def draw_all(self) -> np.ndarray:
        """All pictures, float32 [N, H, W, C]."""
        return np.concatenate([images for _, images in self.draw(range(self.count))])

    def _start(self, wave: list[int]) -> jax.Array:
        padded = np.resize(wave, self.devices)      # a device without a group of its own repeats another's
        numbers = (padded[:, None] * self.group + np.arange(self.group)).reshape(-1)
        return self._program(self._weights, numbers.astype(np.uint32), self.labels[numbers % len(self.labels)])

    def _finish(self, wave: list[int], images: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
        images = np.asarray(images)
        for position, group in enumerate(wave):
            first = position * self.group
            yield group, images[first:first + len(self.numbers(group))]


def _one_group(model: Model, settings: dict, seed: int, vae):
    config, network = model.config, model.network
    sample = build_sampler(network, train_steps=config['diffusion']['steps'], kind=config['diffusion']['kind'],
                           latent_scale=config['latent']['scale'], **settings)

    def draw(weights, number_G, label_G):
        params, vae_params = weights
        images = sample(params, initial_noise(network, seed, number_G), label_G, step_keys(seed, number_G))
        if vae is None:
            return images
        # One by one: a picture's decoding takes far more memory than its denoising.
        return vae.network.decode(vae_params, images + vae.shift, one_by_one=True).astype(jnp.float32)

    return draw
