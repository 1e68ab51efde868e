"""Makes sets of cached latents without a VAE, and a VAE of some thousand parameters to make real ones
with."""
import contextlib
import json

import jax
import numpy as np
import pytest

from lit_jax.checkpoint.vae_folder import save_vae_folder
from lit_jax.data.latent_shards import ShardWriter, shard_ranges
from lit_jax.data.latents import exact_moments, pack
from lit_jax.latents.prepare import make_metadata
from lit_jax.models.vae import VaeNetwork

# halves the sides
VAE_ARCH = {'widths': (4, 8), 'layers': 1, 'groups': 2, 'channels': 3, 'image_channels': 3}


def moments_of(index: int, size: int = 4, channels: int = 3) -> np.ndarray:
    """float32 [2, h, w, 2C] of example `index` of `write_latents`."""
    return np.random.default_rng((7, index)).standard_normal((2, size, size, 2 * channels), np.float32)


def write_latents(folder, count: int = 20, *, size: int = 4, channels: int = 3, classes: int = 5,
                  downscale: int = 2,
                  dtype: str = 'float32', shard_size: int = 6, split: str = 'train',
                  bad: tuple[int, ...] = (), scale: float = 0.5, **more) -> dict:
    """A whole data set; example i has moments_of(i) and the label i mod classes. Examples in `bad` are left
    out. more: fields of the plan; with exact=True example i is the mean of moments_of(i)[0].

    Returns its metadata."""
    plan = {'format': 1, 'kind': 'latents',
            'vae': {'id': 'made-up', 'sha256': 'ab' * 32, 'scale': scale, 'shift': 0.0,
                    'downscale': downscale, 'channels': channels, 'dtype': 'float32'},
            'image_size': size * downscale, 'latent_size': size, 'crop': 'adm-center-crop',
            'classes': [f'class {i}' for i in range(classes)], 'dtype': dtype, 'shard_size': shard_size,
            'source': {'name': 'folder', 'count': count, 'classes': classes, 'sha256': 'cd' * 32,
                       'split': split}, **more}
    (folder / 'shards').mkdir(parents=True)
    (folder / 'preparation.json').write_text(
        json.dumps({'plan': plan, 'command': 'python prepare_latents.py --data=folder'}))
    notes = []
    for number, indices in enumerate(shard_ranges(plan)):
        with ShardWriter(folder, number, plan) as writer:
            for i in indices:
                if i in bad:
                    writer.skip(i, f'image {i}', 'it is empty (0 bytes)')
                elif more.get('exact'):
                    values = moments_of(i, size, channels)[:1, ..., :channels]
                    writer.write(pack(values, i % classes, dtype), exact_moments(values), labels=i % classes)
                else:
                    writer.add(moments_of(i, size, channels), i % classes)
            notes.append(writer.commit())
    metadata = make_metadata(plan, notes)
    (folder / 'metadata.json').write_text(json.dumps(metadata))
    return metadata


def write_tiny_vae(folder, *, seed: int = 0, scale: float = 4.0, **arch):
    """A VAE folder with random weights; returns its path."""
    network, rng = VaeNetwork({**VAE_ARCH, **arch}), np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), network.abstract())
    return save_vae_folder(folder, {'vae': network.arch, 'id': f'tiny-{seed}', 'scale': scale,
                                    'provenance': {'source': 'random weights'}}, params)


class Killed(BaseException):
    """As a kill: nothing that catches errors stops it."""


@contextlib.contextmanager
def killed_in(monkeypatch, module, name: str, after: int):
    """The block ends where `module.name` is called more than `after` times; pytest fails if it is not."""
    original, calls = getattr(module, name), []

    def kill(*arguments):
        calls.append(0)
        if len(calls) > after:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, kill)
        yield
