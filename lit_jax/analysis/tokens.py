"""Computes the attention maps of one query token over the grid (DyDi-LiT, arXiv 2601.13683, figure 6)."""
from collections.abc import Sequence

import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.analysis.maps import Attention, attention_map
from lit_jax.analysis.measures import spread
from lit_jax.runtime.errors import UserError


def parse_token(text: str, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the token grid from 'ROW,COLUMN', both from 0; '' is the middle."""
    if not text:
        return grid[0] // 2, grid[1] // 2
    parts = text.split(',')
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f'--token={text} is not a position on the grid; give ROW,COLUMN, such as 0,3')
    row, column = map(int, parts)
    if row >= grid[0] or column >= grid[1]:
        raise UserError(f'--token={text} is outside the grid of {grid[0]} x {grid[1]} tokens; rows are 0 to '
                        f'{grid[0] - 1}, columns 0 to {grid[1] - 1}')
    return row, column


def parse_layers(text: str, depth: int, name: str, most: int) -> list[int]:
    """The layers of '0,3,11', counted from 0; '' is `most` of them, evenly spaced."""
    if not text:
        return spread(depth, most)
    parts = [part.strip() for part in text.split(',')]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f'--layers={text} is not a list of layers, such as 0,3,11')
    layers = [int(part) for part in parts]
    if max(layers) >= depth:
        raise UserError(f'--layers={text}: {name} has the layers 0 to {depth - 1}')
    return layers


def token_maps(attention: Attention, images: Images, number: int, t: float, token: tuple[int, int],
               layers: Sequence[int]) -> dict:
    """{'layers', 'maps': weights [K, rows, columns] by layer, 'uniform': 1/M by layer} of one image.

    The grid of the keys is smaller than that of the queries if a mixer merges keys."""
    some = images[number:number + 1]
    seen = attention.layers(some.noised(t), t, some.label)
    row = token[0] * attention.grid[1] + token[1]
    maps = []
    for i in layers:
        query, key = seen[i].query[0, row:row + 1], seen[i].key[0]
        weights_KM = np.asarray(attention_map(seen[i].kind, query, key))[:, 0]
        maps.append(weights_KM.reshape(len(weights_KM), *key_grid(attention.grid, weights_KM.shape[1])))
    return {'layers': list(layers), 'maps': maps, 'uniform': [1 / weights[0].size for weights in maps]}


def key_grid(grid: tuple[int, int], keys: int) -> tuple[int, int]:
    """(rows, columns) of `keys` keys on a grid that is coarser by a whole factor, sides rounded up."""
    for factor in range(1, max(grid) + 1):
        rows, columns = -(-grid[0] // factor), -(-grid[1] // factor)
        if rows * columns == keys:
            return rows, columns
    raise UserError(f'{keys} keys do not lie on the grid of {grid[0]} x {grid[1]} tokens, so the map of a '
                    f'token cannot be drawn; leave it out: --parts=similarity,rank,loss')
