"""Makes sets of cached latents with text features, without a VAE or a text encoder."""
import json

import ml_dtypes
import numpy as np

from lit_jax.data import caption_latents, text_features
from lit_jax.data.latent_shards import ShardWriter, shard_ranges
from lit_jax.latents.prepare import make_metadata

SHAPES = ((4, 16), (8, 8), (16, 4))     # of the images; half of that in latents
LENGTH, WIDTH = 10, 6


def bucket_of(index: int, buckets: int) -> int:
    return index * 7 % 5 % buckets


def moments_of(index: int, shape: tuple[int, int], channels: int = 3) -> np.ndarray:
    """float32 [h, w, 2C] of example `index` of `write_caption_latents`."""
    return np.random.default_rng((7, index)).standard_normal((shape[0] // 2, shape[1] // 2, 2 * channels),
                                                             np.float32)


def texts_of(index: int) -> list[np.ndarray]:
    """Features [tokens, WIDTH] of its captions, the long one first; each third example has one."""
    rng = np.random.default_rng((8, index))
    return [rng.standard_normal((LENGTH - index % 4 if row == 0 else 1 + index % 3,
                                 WIDTH)).astype(ml_dtypes.bfloat16)
            for row in range(2 if index % 3 else 1)]


def null_of() -> tuple[np.ndarray, np.ndarray]:
    text = np.random.default_rng(9).standard_normal((LENGTH, WIDTH)).astype(ml_dtypes.bfloat16)
    return text, np.array([1] + [0] * (LENGTH - 1), np.int32)


def write_caption_latents(folder, count: int = 20, *, shapes=SHAPES, dtype: str = 'float32',
                          shard_size: int = 6, split: str = 'train', encoder: str = 'made-up t5') -> dict:
    """A whole data set; example i has the bucket bucket_of(i), moments_of(i) and texts_of(i). Returns its
    metadata."""
    plan = {'format': 1, 'kind': 'caption_latents',
            'vae': {'id': 'made-up', 'sha256': 'ab' * 32, 'scale': 0.5, 'shift': 0.0, 'downscale': 2,
                    'channels': 3, 'dtype': 'float32'},
            'text': {'encoder': encoder, 'sha256': 'ef' * 32, 'tokens': LENGTH, 'width': WIDTH,
                     'dtype': 'bfloat16'},
            'image_size': 8, 'latent_size': 4, 'crop': 'cover-center-crop',
            'buckets': [list(shape) for shape in shapes],
            'classes': [], 'dtype': dtype, 'shard_size': shard_size,
            'source': {'name': 'captions', 'count': count, 'sha256': 'cd' * 32, 'split': split}}
    (folder / 'shards').mkdir(parents=True)
    (folder / 'preparation.json').write_text(
        json.dumps({'plan': plan, 'command': 'python prepare_latents.py --data=captions'}))
    notes = []
    for number, indices in enumerate(shard_ranges(plan)):
        with ShardWriter(folder, number, plan) as writer:
            for i in indices:
                bucket, texts = bucket_of(i, len(shapes)), texts_of(i)
                moments = moments_of(i, shapes[bucket])
                writer.write(caption_latents.pack(moments, bucket, texts, dtype), moments, buckets=bucket,
                             cut=0, tokens=([len(text) for text in texts] + [0])[:2])
            notes.append(writer.commit())
    text_features.write_null(folder, *null_of())
    metadata = make_metadata(plan, notes, (folder / text_features.NULL).read_bytes())
    (folder / 'metadata.json').write_text(json.dumps(metadata))
    return metadata
