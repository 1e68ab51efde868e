"""Encodes images and captions on all devices of this process into shards of cached latents.

Each device runs the same program on the same number of images or captions, however many devices there are.
"""
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.vae_folder import Vae
from lit_jax.data import caption_latents, latents
from lit_jax.data.base import Source
from lit_jax.data.images import BadImage, ImageSource, load_or_bad
from lit_jax.data.latent_shards import ShardWriter, shard_ranges
from lit_jax.data.text_features import count_tokens
from lit_jax.runtime.device_groups import DeviceGroups
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import explain_unwritable
from lit_jax.runtime.progress import Progress
from lit_jax.runtime.read_ahead import read_ahead, start_ahead

LOG = logging.getLogger('lit_jax')


def _in_full(function: Callable) -> Callable:
    """Computes float32 at full precision: TPUs and GPUs would use fewer bits. No effect on bfloat16."""
    def precise(params, rows):
        with jax.default_matmul_precision('highest'):
            return function(params, rows)
    return precise


class ImageEncoder:
    """Moments of images and of their mirror images.

    per_device: batch size of a device. batch_size: of all devices of this process."""

    def __init__(self, vae: Vae, per_device: int, *, mirror: bool):
        network = vae.network

        def encode(params, image_BHWC):
            if not mirror:
                return jnp.concatenate(network.encode(params, image_BHWC), axis=-1)
            both = jnp.concatenate([image_BHWC, image_BHWC[:, :, ::-1]])
            return jnp.stack(jnp.split(jnp.concatenate(network.encode(params, both), axis=-1), 2), axis=1)

        self._groups = DeviceGroups(_in_full(encode), vae.params, per_device)
        self.batch_size = self._groups.batch

    def __call__(self, images: dict[int, np.ndarray]) -> jax.Array | None:
        """{row: image [H, W, C] of one shape} -> float32 [batch_size, 2, h, w, 2C], without mirror images
        [batch_size, h, w, 2C]. Rows without an image are meaningless; None if there is no image."""
        if not images:
            return None
        batch = np.zeros((self.batch_size, *next(iter(images.values())).shape), np.float32)
        for row, image in images.items():
            batch[row] = image
        return self._groups.start(batch)


class CaptionEncoder:
    """Features of captions of L = `length` tokens. encoder: a `TextEncoder`."""

    def __init__(self, encoder, length: int, per_device: int):
        def encode(params, tokens):
            return encoder.network.apply(params, *tokens).astype(jnp.bfloat16)

        self._tokenizer, self._length = encoder.tokenizer, length
        self._groups = DeviceGroups(_in_full(encode), encoder.params, per_device)

    def __call__(self, captions: Sequence[str]) -> tuple[list[jax.Array], np.ndarray, set[int]]:
        """(features bfloat16 [>= n, L, C] in parts, masks int32 [n, L], indices of truncated captions)."""
        size, tokens = self._groups.batch, self._tokenizer.encode(captions, self._length)
        parts = [self._groups.start((tokens.ids[start:start + size], tokens.mask[start:start + size]))
                 for start in range(0, len(tokens.ids), size)]
        return parts, tokens.mask, set(tokens.truncated)


# Records. `start` sends a block to the devices, and `finish` waits for the results.


@dataclasses.dataclass(frozen=True)
class Record:
    """One example: float32 moments [..., 2C], its bytes, and its entries in the note of the shard."""
    moments: np.ndarray
    data: bytes
    facts: dict


class _Records:
    def __init__(self, vae: Vae, plan: dict, per_device: int, *, mirror: bool):
        self._encode, self._dtype = ImageEncoder(vae, per_device, mirror=mirror), plan['dtype']
        self._largest = float(np.finfo(latents.DTYPES[self._dtype]).max)
        self.batch_size = self._encode.batch_size

    def _start_images(self, examples: dict[int, dict]):
        return self._encode({row: example['image'] for row, example in examples.items()})

    def _finish_images(self, pending, examples: dict[int, dict], block: '_Block') -> dict[int, np.ndarray]:
        """{row: moments}. UserError if one cannot be stored."""
        moments = np.asarray(pending)
        for row in examples:
            if not np.all(np.abs(moments[row]) <= self._largest):      # also true for NaN
                raise UserError(f'the VAE encodes example {block.indices[row]} to NaN, or to more than '
                                f'{self._largest:.3g}: give --vae_dtype=float32 and --dtype=float32, or '
                                f'check the VAE')
        return {row: moments[row] for row in examples}


class LabelRecords(_Records):
    """Records of images with labels: both mirror images, then the label."""

    def __init__(self, vae: Vae, plan: dict, per_device: int):
        super().__init__(vae, plan, per_device, mirror=True)

    def start(self, examples: dict[int, dict], block: '_Block'):
        """{row: example} of a block."""
        return self._start_images(examples)

    def finish(self, pending, examples: dict[int, dict], block: '_Block') -> dict[int, Record]:
        """{row: record} of what was started."""
        made = {}
        for row, moments in self._finish_images(pending, examples, block).items():
            label = int(examples[row]['label'])
            made[row] = Record(moments, latents.pack(moments, label, self._dtype), {'labels': label})
        return made


class CaptionRecords(_Records):
    """Records of images with captions: the image, and the features of each caption."""

    def __init__(self, vae: Vae, encode_captions: CaptionEncoder, plan: dict, per_device: int):
        super().__init__(vae, plan, per_device, mirror=False)
        self._captions = encode_captions

    def start(self, examples: dict[int, dict], block: '_Block'):
        # In the order of the records: the long caption first.
        captions = [caption for example in examples.values() for caption in reversed(example['captions'])]
        return self._start_images(examples), self._captions(captions)

    def finish(self, pending, examples: dict[int, dict], block: '_Block') -> dict[int, Record]:
        moments, (parts, masks, cut) = self._finish_images(pending[0], examples, block), pending[1]
        texts = [text for part in parts for text in np.asarray(part)]
        made, first = {}, 0
        for row, example in examples.items():
            numbers = range(first, first + len(example['captions']))
            first = numbers.stop
            lengths = [count_tokens(masks[i]) for i in numbers]
            features = [texts[i][:length] for i, length in zip(numbers, lengths, strict=True)]
            if not all(np.isfinite(feature.astype(np.float32)).all() for feature in features):
                raise UserError(f'the text encoder encodes a caption of example {block.indices[row]} '
                                f'({example["captions"][0]:.60}) to NaN: give --text_dtype=float32, or check '
                                f'the text encoder')
            facts = {'buckets': block.bucket, 'tokens': (lengths + [0])[:2],
                     'cut': sum(i in cut for i in numbers)}
            data = caption_latents.pack(moments[row], block.bucket, features, self._dtype)
            made[row] = Record(moments[row], data, facts)
        return made


@dataclasses.dataclass(frozen=True)
class _Block:
    """Examples of one shard and one bucket that are encoded together."""
    shard: int
    indices: list[int]
    bucket: int = 0


def in_order(source: Source) -> np.ndarray:
    """Indices of the examples in the order of the records: by bucket."""
    return np.arange(len(source)) if source.bucket_of is None else np.argsort(source.bucket_of, kind='stable')


def make_shards(source: Source, records, plan: dict, out, numbers: list[int], *, record_size: float,
                threads: int, strict: bool) -> None:
    """Makes the shards with these numbers of the data set `plan` in the folder `out`.

    Args:
        records: LabelRecords or CaptionRecords. record_size: about the bytes of one.
        threads: for decoding. strict: an image that cannot be decoded is a UserError, not left out."""
    ranges, order = shard_ranges(plan), in_order(source)
    # Blocks never cross shards, so batches depend only on the shard.
    blocks = [block for number in numbers
              for block in _blocks(number, order[ranges[number].start:ranges[number].stop], source.bucket_of,
                                   records.batch_size)]
    images = read_ahead(lambda index: load_or_bad(source, index, strict),
                        [block.indices for block in blocks], threads)
    total = sum(len(block.indices) for block in blocks)
    with Progress(total, 'images') as progress, contextlib.closing(images):
        encoded = _encode(records, zip(blocks, images, strict=True))
        for number, parts in itertools.groupby(encoded, key=lambda part: part[0].shard):
            with (explain_unwritable(out, record_size * len(ranges[number])),
                  ShardWriter(out, number, plan) as writer):
                for block, examples, made in parts:
                    for row, (index, example) in enumerate(zip(block.indices, examples, strict=True)):
                        if isinstance(example, BadImage):
                            writer.skip(index, example.name, example.reason)
                        else:
                            writer.write(made[row].data, made[row].moments, **made[row].facts)
                    progress.add(len(examples))
                note = writer.commit()
            if note['bad']:
                _, name, reason = note['bad'][0]
                LOG.warning('left out: %d images of %d that cannot be decoded; the first: %s: %s',
                            len(note['bad']), len(ranges[number]), name, reason)
    if isinstance(source, ImageSource):
        source.say_ignored()


def _blocks(shard: int, indices: np.ndarray, bucket_of: np.ndarray | None, size: int) -> Iterator[_Block]:
    buckets = np.zeros(len(indices), int) if bucket_of is None else bucket_of[indices]
    for part in np.split(indices, np.flatnonzero(np.diff(buckets)) + 1):
        bucket = 0 if bucket_of is None else int(bucket_of[part[0]])
        yield from (_Block(shard, part[start:start + size].tolist(), bucket)
                    for start in range(0, len(part), size))


def _encode(records, loaded: Iterable[tuple[_Block, list]]) -> Iterator[tuple[_Block, list, dict]]:
    """Adds {row: record} of the examples that could be decoded; the next block is in flight meanwhile."""
    def good(examples: list) -> dict[int, dict]:
        return {row: example for row, example in enumerate(examples) if not isinstance(example, BadImage)}

    started = start_ahead(loaded, lambda item: records.start(good(item[1]), item[0]), count=1)
    for (block, examples), pending in started:
        yield block, examples, records.finish(pending, good(examples), block)
