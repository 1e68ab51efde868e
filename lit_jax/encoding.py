"""Pictures through the encoder of a VAE, on all devices of this process, into shards of cached latents."""
import contextlib
import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.checkpoint import storage
from lit_jax.checkpoint.vae_folder import Vae
from lit_jax.data.base import Source
from lit_jax.data.images import BadPicture, ImageSource
from lit_jax.data.latent_shards import ShardWriter, shard_ranges
from lit_jax.data.latents import DTYPES, record_bytes
from lit_jax.errors import UserError
from lit_jax.progress import Progress

LOG = logging.getLogger('lit_jax')
_AHEAD = 2  # blocks of pictures that are decoded while the devices work on another


class Encoder:
    """Moments of pictures and their mirror images, both from one pass.

    Every device runs the same program on `per_device` pictures, however many devices there are.

    Args:
        image_shape: (H, W, C) of a picture.
    Attributes:
        batch_size: pictures that all devices of this process take at a time.
    """

    def __init__(self, vae: Vae, image_shape: tuple[int, int, int], per_device: int):
        devices, network = jax.local_devices(), vae.network
        # An axis of its own name: the layers lay activations out on those of training, here each device is alone.
        mesh = jax.make_mesh((len(devices),), ('devices',), axis_types=(AxisType.Auto,), devices=devices)
        self.batch_size = per_device * len(devices)
        self._shape = (self.batch_size, *image_shape)
        self._sharding = NamedSharding(mesh, P('devices'))
        self._params = jax.device_put(vae.params, NamedSharding(mesh, P()))

        def encode(params, image_BHWC):
            both = jnp.concatenate([image_BHWC, image_BHWC[:, :, ::-1]])
            # float32 is meant in full: the matrix units of TPUs and GPUs would take fewer bits. bfloat16 does not mind.
            with jax.default_matmul_precision('highest'):
                moments = jnp.concatenate(network.encode(params, both), axis=-1)
            return jnp.stack(jnp.split(moments, 2), axis=1)

        on_each = jax.shard_map(encode, mesh=mesh, in_specs=(P(), P('devices')), out_specs=P('devices'), check_vma=False)
        self._encode = jax.jit(on_each)

    def __call__(self, images: dict[int, np.ndarray]) -> jax.Array:
        """{row: picture} -> float32 [batch_size, 2, h, w, 2C]; rows without a picture mean nothing."""
        batch = np.zeros(self._shape, np.float32)
        for row, image in images.items():
            batch[row] = image
        return self._encode(self._params, jax.device_put(batch, self._sharding))


@dataclasses.dataclass(frozen=True)
class _Block:
    """Examples of one shard that go through the VAE together."""
    shard: int
    indices: range


def make_shards(source: Source, encode: Encoder, plan: dict, out, numbers: list[int], *, threads: int,
                strict: bool) -> None:
    """Makes the shards with these numbers of the data set `plan` in the folder `out`.

    threads: that decode pictures. strict: a picture that cannot be decoded is a UserError, not left out."""
    ranges = shard_ranges(plan)
    # Blocks never cross shards: what is computed together depends on the shard alone.
    blocks = [_Block(number, ranges[number][start:start + encode.batch_size])
              for number in numbers for start in range(0, len(ranges[number]), encode.batch_size)]
    loaded = _load(source, blocks, threads, strict)
    with Progress(sum(len(block.indices) for block in blocks), 'pictures') as progress, contextlib.closing(loaded):
        for number, parts in itertools.groupby(_encode(encode, loaded), key=lambda part: part[0].shard):
            with (storage.explain_full_disk(out, record_bytes(plan) * len(ranges[number])),
                  ShardWriter(out, number, plan) as writer):
                for block, examples, moments in parts:
                    _write(writer, block, examples, moments, float(np.finfo(DTYPES[plan['dtype']]).max))
                    progress.add(len(examples))
                note = writer.commit()
            if note['bad']:
                _, name, reason = note['bad'][0]
                LOG.warning('left out: %d pictures of %d that cannot be decoded; the first: %s: %s', len(note['bad']),
                            len(ranges[number]), name, reason)


def _write(writer: ShardWriter, block: _Block, examples: list, moments: np.ndarray, largest: float) -> None:
    for index, example, pair in zip(block.indices, examples, moments, strict=False):  # the last batch is filled up
        if isinstance(example, BadPicture):
            writer.skip(index, example.name, example.reason)
        elif not np.all(np.abs(pair) <= largest):      # NaN is not
            raise UserError(f'the VAE makes NaN of example {index}, or more than {largest:.3g}: give --vae_dtype=float32 and '
                            '--dtype=float32, or check the VAE')
        else:
            writer.add(pair, example['label'])


def _load(source: Source, blocks: list[_Block], threads: int, strict: bool) -> Iterator[tuple[_Block, list]]:
    """(block, its examples) in order; in the place of a picture that cannot be decoded stands its BadPicture."""
    read = source.load if isinstance(source, ImageSource) else source.__getitem__

    def load(index: int):
        try:
            return read(index)
        except BadPicture as error:
            if strict:
                raise
            return error

    pool, queue = ThreadPoolExecutor(threads), deque()
    try:
        for block in [*blocks, *[None] * _AHEAD]:
            if block is not None:
                queue.append((block, [pool.submit(load, index) for index in block.indices]))
            if queue and (block is None or len(queue) > _AHEAD):
                ready, futures = queue.popleft()
                yield ready, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(encode: Callable, loaded: Iterable[tuple[_Block, list]]) -> Iterator[tuple[_Block, list, np.ndarray]]:
    """Adds moments float32 [at least as many as examples, 2, h, w, 2C]; the next block is on its way meanwhile."""
    before = None
    for block, examples in loaded:
        images = {row: example['image'] for row, example in enumerate(examples) if not isinstance(example, BadPicture)}
        now = block, examples, encode(images)
        if before is not None:
            yield (*before[:2], np.asarray(before[2]))
        before = now
    if before is not None:
        yield (*before[:2], np.asarray(before[2]))
