"""Rotary positions of a grid of tokens, as EVA and LightningDiT have them: neighbouring channels of a head
turn as pairs, the first half of them by the row, the second by the column."""
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from lit_jax.models.layers import Array
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

BASE = 10000.0
ROTARY = 'feat_rope.freqs_cos', 'feat_rope.freqs_sin'      # the tables in PyTorch files


def rotary_tables(grid: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, sines) [N, E] of the angles of all tokens, rows first, float32 (computed in float64)."""
    frequencies = BASE ** (-2 * np.arange(size // 4) / (size // 2))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    angles = angles.repeat(2, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x_BNKE: Array, grid: tuple[int, int]) -> Array:
    """Queries or keys, turned by the positions of their tokens, in their dtype."""
    dtype, size = accumulator(x_BNKE), x_BNKE.shape[-1]
    cosine, sine = (jnp.asarray(table, dtype)[:, None] for table in rotary_tables(grid, size))
    x = x_BNKE.astype(dtype)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x * cosine + turned * sine).astype(x_BNKE.dtype)


def rotary_of(arch: Mapping, mixers: list[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """The tables of the first of an architecture's mixers that turns; None where none does."""
    turning = next((mixer for mixer in mixers if mixer.get('rope')), None)
    grid = tuple(side // arch['patch'] for side in arch['input_size'])
    return rotary_tables(grid, arch['width'] // turning['heads']) if turning else None


def check_rotary(width: int, heads: int) -> None:
    """Raises UserError for heads whose channels do not fall into pairs of rows and pairs of columns."""
    if width // heads % 4:
        raise UserError(f'mixer.rope turns pairs of channels by row and by column, so a head needs a '
                        f'multiple of 4 channels; {heads} heads of width {width} have {width // heads}')
