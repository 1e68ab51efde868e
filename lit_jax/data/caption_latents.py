"""Cached latents with text features: images with captions, encoded by a VAE and a text encoder.

The folder is that of lit_jax/data/latents.py plus null_text.bin (lit_jax/data/text_features.py). Records, one
per image, little-endian:

    int32 x 4       bucket, number of captions (1 or 2), tokens of the long and of the short caption (0: none)
    moments         of the image, [h, w, 2C], mean before log-variance, not scaled; float32 or float16 (of an
                    exact set, drawn by a teacher: latents or pixels [h, w, C])
    features        of the long (or only) caption, then of the short one, bfloat16 [tokens, width] each

Images are not mirrored: captions that say "left" would become false. Records are in the order of their
buckets, as images of one shape go through the VAE together."""
from collections.abc import Iterator, Sequence

import numpy as np

from lit_jax.data import text_features
from lit_jax.data.base import Source, Spec, check_index
from lit_jax.data.latents import (
    DTYPES,
    CachedLatents,
    check_asked,
    continue_command,
    exact_moments,
    open_cached,
)
from lit_jax.runtime.errors import UserError

KIND = 'caption_latents'
_HEAD = np.dtype('<i4')


class CaptionLatentSource(CachedLatents):
    """Elements {'moments': float32 [h, w, 2C], 'text': bfloat16 [2, L, width], 'text_mask': int32 [2, L]}.

    Row 0 is the long caption, row 1 the short one; a single caption is in both. `captions.choose_caption`
    takes one of them. Features of padding are zero. `spec` and `buckets` are those of the latents.

    metadata: the content of metadata.json (`lit_jax.latents.prepare.make_metadata`)."""

    def __init__(self, folder, metadata: dict):
        super().__init__(folder, metadata, Spec(metadata['latent_size'], metadata['vae']['channels'], 0, ()))
        downscale, text = metadata['vae']['downscale'], metadata['text']
        self._shapes = [(height // downscale, width // downscale) for height, width in metadata['buckets']]
        self._length, self._width, self._dtype = text['tokens'], text['width'], DTYPES[metadata['dtype']]
        if len(self._shapes) > 1:
            self.buckets = tuple(self._shapes)
            self.bucket_of = np.array([number for note in self.notes() for number in note['buckets']],
                                      np.int32)

    take, all_labels = Source.take, Source.all_labels      # instead of those of latents with labels

    def __getitem__(self, index: int) -> dict:
        record = self._read(check_index(int(index), len(self)))
        bucket, count, *lengths = _head(record)
        exact = self.metadata.get('exact', False)
        shape = (*self._shapes[bucket], (1 if exact else 2) * self.spec.channels)
        moments = np.frombuffer(record, self._dtype, int(np.prod(shape)), 4 * _HEAD.itemsize).reshape(shape)
        offset = 4 * _HEAD.itemsize + moments.nbytes
        text = np.zeros((count, self._length, self._width), text_features.BFLOAT16)
        mask = np.zeros((count, self._length), np.int32)
        for row, tokens in enumerate(lengths[:count]):
            text[row, :tokens] = text_features.unpack_features(record, offset, tokens, self._width)
            mask[row, :tokens] = 1
            offset += text_features.feature_bytes(tokens, self._width)
        moments = exact_moments(moments) if exact else moments
        return {'moments': moments.astype(np.float32), 'text': np.broadcast_to(text, (2, *text.shape[1:])),
                'text_mask': np.broadcast_to(mask, (2, self._length))}

    def each(self, indices: Sequence[int]) -> Iterator[dict]:
        return (self[int(index)] for index in indices)  # never both captions of a whole batch

    @property
    def null_features(self) -> tuple[np.ndarray, np.ndarray]:
        """(text bfloat16 [L, width], mask int32 [L]) of the empty caption, its padding included."""
        return text_features.read_null(self.folder, self.metadata['text'])

    def _fits(self, record: bytes) -> bool:
        if len(record) < 4 * _HEAD.itemsize:
            return False
        bucket, count, long, short = _head(record)
        return (0 <= bucket < len(self._shapes) and count in (1, 2)
                and 0 < long <= self._length and 0 <= short <= self._length
                and len(record) == record_bytes(self.metadata, bucket, long + short))


def pack(moments: np.ndarray, bucket: int, texts: Sequence[np.ndarray], dtype: str) -> bytes:
    """A record of float32 [h, w, 2C] (of an exact set [h, w, C]) and the features [tokens, width] of one or
    two captions, long first."""
    lengths = [len(text) for text in texts] + [0] * (2 - len(texts))
    head = np.array([bucket, len(texts), *lengths], _HEAD)
    return b''.join((head.tobytes(), moments.astype(DTYPES[dtype]).tobytes(),
                     *(text_features.pack_features(text, len(text)) for text in texts)))


def record_bytes(plan: dict, bucket: int, tokens: float) -> int:
    """Bytes of a record of a bucket; tokens: of all its captions."""
    height, width = plan['buckets'][bucket]
    values = height * width // plan['vae']['downscale'] ** 2 * plan['vae']['channels']
    values *= 1 if plan.get('exact') else 2
    return (4 * _HEAD.itemsize + values * DTYPES[plan['dtype']].itemsize
            + text_features.feature_bytes(round(tokens), plan['text']['width']))


def _head(record: bytes) -> list[int]:
    return np.frombuffer(record, _HEAD, 4).tolist()


def open_caption_latents(folder, *, split: str = 'train', asked: dict | None = None,
                         tokens: int | None = None, buckets: bool | None = None) -> CaptionLatentSource:
    """The latents with text features in a folder.

    Args:
        asked: image_size and channels of the latents, None for any.
        tokens: required L. buckets: whether there must be several shapes. None: any.
    Raises:
        UserError: there is no complete data set of that split and kind, or its numbers differ."""
    folder, metadata = open_cached(folder, split, KIND)
    own = {'image_size': metadata['latent_size'], 'channels': metadata['vae']['channels']}
    check_asked(folder, own, asked or {})
    text_features.check_text(folder, metadata, tokens=tokens)
    if buckets is False and len(metadata['buckets']) > 1:
        raise UserError(f'the latents in {folder} have {len(metadata["buckets"])} shapes: set '
                        '--config.data.buckets=True, or make square latents: prepare_latents.py without '
                        '--buckets')
    if buckets and len(metadata['buckets']) == 1:
        raise UserError(f'the latents in {folder} are all square: set --config.data.buckets=False, or make '
                        f'them with --buckets. They were made by: {continue_command(folder)}')
    return CaptionLatentSource(folder, metadata)
