"""Rotary positions (EVA, LightningDiT): neighbouring channels of a head turn as pairs, the first half of them
by the row, the second by the column."""
import functools

import torch

from lit_jax.convert.twins.parts_twin import accumulate


@functools.lru_cache(maxsize=8)
def rotary_tables(grid, size, dtype, device):
    """(cosines, sines) [N, 1, E] of the angles of all tokens, rows first."""
    frequencies = 10000.0 ** (-2 * torch.arange(size // 4, dtype=torch.float64) / (size // 2))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing='ij')
    angles = torch.cat([places.reshape(-1, 1) * frequencies for places in (rows, columns)], 1)
    angles = angles.repeat_interleave(2, 1)[:, None]
    return tuple(table.float().to(device, dtype) for table in (angles.cos(), angles.sin()))


def rotate(x, grid):
    """Queries or keys [B, N, K, E], turned by the positions of their tokens."""
    wide = accumulate(x)
    cosine, sine = rotary_tables(tuple(grid), x.shape[-1], wide.dtype, wide.device)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine).to(x.dtype)
