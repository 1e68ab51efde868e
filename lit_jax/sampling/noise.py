"""Noise and random labels of an image: functions of (seed, number of the image), never of batch or device.

The key of image i's initial noise is that of the seed with i folded in. Step noise and labels have keys of
their own, folded from numbers that no image has."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError

Array = jax.Array
STEPS, LABELS = 0xFFFFFFFF, 0xFFFFFFFE
MAX_IMAGES = 1 << 31


def check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise UserError(f'the seed must be a whole number from 0 to {(1 << 32) - 1}, got {seed}')


def initial_noise(network: Network, seed: int | Array, indices: Sequence[int] | Array,
                  size: Sequence[int] | None = None) -> Array:
    """Noise [B, H, W, C] of the images with these numbers: image i depends on (seed, i) only.
    seed: one for all, or one an image. size: (H, W) where it is not the architecture's own."""
    shape = (*(size or network.arch['input_size']), network.arch['channels'])
    return jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(seed, indices))


def step_keys(seed: int | Array, indices: Sequence[int] | Array) -> Array:
    """Keys [B] for the noise of the steps, as `lit_jax.diffusion.samplers` take them."""
    return _keys(seed, indices, STEPS)


def random_labels(seed: int, count: int, classes: Sequence[int]) -> np.ndarray:
    """int32 [count]: each image's class, drawn evenly from `classes` (DiT's sample_ddp.py draws so, too)."""
    keys = _keys(seed, np.arange(count), LABELS)
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(classes)))(keys)
    return np.asarray(classes, np.int32)[np.asarray(drawn)]


def _keys(seed, indices, stream: int | None = None) -> Array:
    def key(seed, index):
        key = jax.random.key(seed)
        return jax.random.fold_in(key if stream is None else jax.random.fold_in(key, stream), index)

    seed = jnp.asarray(seed, jnp.uint32)
    return jax.vmap(key, (0 if seed.ndim else None, 0))(seed, jnp.asarray(indices, jnp.uint32))
