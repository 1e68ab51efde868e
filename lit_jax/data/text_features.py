"""Cached features of captions, in bfloat16: those of the true tokens, without padding.

    record      lit_jax/data/caption_latents.py: features of the long and the short caption, [tokens, C] each
    null_text   features of the empty caption with its padding, [L, C], then its mask, int32 [L]: a dropped
                caption keeps its mask, so models also see the rows of the padding
"""
import hashlib

import ml_dtypes
import numpy as np

from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import explain_unreadable, write_bytes_atomic

DTYPE = 'bfloat16'
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NULL = 'null_text.bin'
_BITS, _MASK = np.dtype('<u2'), np.dtype('<i4')


def feature_bytes(tokens: int, width: int) -> int:
    """Bytes of a caption's features."""
    return tokens * width * BFLOAT16.itemsize


def pack_features(text: np.ndarray, tokens: int) -> bytes:
    """The first `tokens` rows of float [L, C]."""
    return np.ascontiguousarray(text[:tokens], BFLOAT16).view(np.uint16).astype(_BITS, copy=False).tobytes()


def unpack_features(data: bytes, offset: int, tokens: int, width: int) -> np.ndarray:
    """bfloat16 [tokens, C] from `offset` of `data`."""
    bits = np.frombuffer(data, _BITS, tokens * width, offset).astype(np.uint16, copy=False)
    return bits.view(BFLOAT16).reshape(tokens, width)


def count_tokens(mask: np.ndarray) -> int:
    """True tokens of a caption, from its mask int [L]: ones, then zeros."""
    count = int(np.sum(mask))
    if not np.all(mask[:count]):
        raise ValueError('the tokens of a caption must stand before its padding')
    return count


def write_null(folder, text: np.ndarray, mask: np.ndarray) -> None:
    """Writes the features float [L, C] and the mask int32 [L] of the empty caption into a data set."""
    write_bytes_atomic(folder / NULL, pack_features(text, len(text)) + mask.astype(_MASK).tobytes())


def read_null(folder, text: dict) -> tuple[np.ndarray, np.ndarray]:
    """(bfloat16 [L, C], int32 [L]) of the empty caption; UserError if the file is missing or damaged.
    text: that section of a plan or metadata."""
    length, width = text['tokens'], text['width']
    with explain_unreadable(folder / NULL, ': the features of the empty caption. Copy the folder again, or '
                                           'make the file with the command that made the folder'):
        data = (folder / NULL).read_bytes()
    size = feature_bytes(length, width) + length * _MASK.itemsize
    if len(data) != size or 'null' in text and null_digest(data) != text['null']['sha256']:
        raise UserError(f'{folder / NULL} is not as it was written. Delete it; the command that made the '
                        f'folder makes it again')
    mask = np.frombuffer(data, _MASK, length, feature_bytes(length, width))
    return unpack_features(data, 0, length, width), mask.astype(np.int32)


def null_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_text(folder, metadata: dict, where: str = 'in the recipe', **wanted) -> None:
    """Raises one UserError that names every value of cached text features that differs from `wanted`.
    wanted: any of encoder (its id), sha256 (of its weights), tokens (L) and width (C); None is not compared.
    """
    text = metadata['text']
    check_alike({name: text[name] for name in wanted}, wanted, 'in the data set', where,
                f'the cached text features in {folder} are not those {where}',
                'Make them again with prepare_latents.py --text_encoder=FOLDER, or correct the wrong value',
                none_fits=True)
