"""Encodes captions to features in batches."""
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_jax.runtime.errors import UserError, shown_name

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of captions, the input of a text-to-image model.

    text: numpy [B, L, C] in the encoder's compute dtype; padding rows are as the network computes them. mask:
    int32 [B, L]. truncated: indices of captions longer than L tokens."""
    text: np.ndarray
    mask: np.ndarray
    truncated: list[int] = field(default_factory=list)


def encode_captions(encoder, captions: Sequence[str], length: int, batch_size: int | None = None) -> Features:
    """Runs the text encoder over captions.

    Args:
        encoder: `lit_jax.checkpoint.text_encoder_folder.TextEncoder`.
        length: tokens to which captions are padded or cut (300 for PixArt-Σ).
        batch_size: captions at a time, default at most 8. The last batch is padded with empty captions."""
    if not captions:
        raise UserError('there are no captions to encode')
    tokens = encoder.tokenizer.encode(captions, length)
    if tokens.truncated:
        _LOG.warning('%s', truncation_notice(captions, tokens.truncated, length))
    batch_size = min(len(captions), 8) if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f'captions are encoded in batches of at least 1, got {batch_size}')
    filled = -len(captions) % batch_size
    empty = encoder.tokenizer.encode([''] * filled, length)
    ids, mask = np.concatenate([tokens.ids, empty.ids]), np.concatenate([tokens.mask, empty.mask])
    parts = [np.asarray(encoder.encode(ids[i:i + batch_size], mask[i:i + batch_size]))
             for i in range(0, len(ids), batch_size)]
    return Features(np.concatenate(parts)[:len(captions)], tokens.mask, tokens.truncated)


def truncation_notice(captions: Sequence[str], truncated: Sequence[int], length: int) -> str:
    """One line about captions that were cut, with the beginning of the first ones."""
    shown = ', '.join(f'"{shown_name(captions[i].strip()[:40])}..."' for i in truncated[:3])
    more = f' and {len(truncated) - 3} more' if len(truncated) > 3 else ''
    return (f'{len(truncated)} of {len(captions)} captions are longer than {length - 1} tokens; the rest of '
            f'them is not read: {shown}{more}')
