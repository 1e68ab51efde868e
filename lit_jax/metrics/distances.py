"""Exact nearest neighbours and neighbourhoods in two large sets of features, in blocks of bounded memory.

Squared distances as |u|² - 2u·v + |v|² in float32 lose all digits for nearly equal rows. Yet the comparisons
here are those of float64: float32 blocks on the accelerators give a lower and an upper bound for every pair,
and the few pairs that these leave open are computed on the host as Σ(u - v)² in float64. So answers depend
neither on the blocks nor on the devices.

The bounds: rows are moved by a common origin and scaled by a power of two; then a product of d terms, summed
in any order in float32, errs by at most d·2⁻²⁴|u||v| (Higham 2002, §3.1); rounding adds some 2⁻²⁴(|u|²+|v|²).

The float16 form does the same for distances as the ADM evaluator computes them: rows, products, squared norms
and each sum rounded to float16, except in blocks of 10000 x 10000 rows in which a distance could overflow."""
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.metrics.checks import CHUNK
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.read_ahead import start_ahead

Array = jax.Array
ROWS, COLS = 2048, 8192       # pairs in a block: 64 MB of float32 distances
ADM_BLOCK = 10000
PAIRS = 2048                  # pairs of rows computed together on the host
SPARE = 3                     # neighbours kept beyond those requested; more make second looks rarer
HALF_MAX = 65504.0            # the largest float16
HALF_NORMAL = 6.2e-5          # above every subnormal float16
TINY = 1e-30                  # above what float32 loses where numbers are too small for it


class Block(NamedTuple):
    """Rows on a device: x [n, d], |x|² [n], and bounds of a squared radius [n] (-inf for padding rows)."""
    x: Array
    norm: Array
    least: Array
    most: Array


class Rows:
    """A set of features [N, d], and its blocks."""

    def __init__(self, raw: np.ndarray, origin: np.ndarray, scale: float, half: bool):
        self.raw, self._origin, self.scale = raw, origin, scale
        # The longest row of each of ADM's blocks decides which pairs of blocks stay in float16.
        self.longest = np.array([_longest(raw[start:start + ADM_BLOCK])
                                 for start in range(0, len(raw), ADM_BLOCK)]) if half else None

    def __len__(self) -> int:
        return len(self.raw)

    def block(self, ids: np.ndarray, radii: np.ndarray, size: int, half: bool) -> Block:
        """The rows `ids`, padded to `size`, with their squared `radii`."""
        x = np.zeros((size, self.raw.shape[1]), np.float32)
        if half:
            x[:len(ids)] = self.raw[ids].astype(np.float16)
            norm = np.square(x, dtype=np.float64).sum(axis=1).astype(np.float16)
        else:
            x[:len(ids)] = (self.raw[ids].astype(np.float64) - self._origin) * self.scale
            norm = np.square(x, dtype=np.float64).sum(axis=1)
            radii = radii * self.scale ** 2
        filled = np.full(size, -np.inf)
        filled[:len(ids)] = radii
        return Block(x, norm.astype(np.float32), _float32_towards(filled, -np.inf),
                     _float32_towards(filled, np.inf))


class Geometry:
    """Distances between the rows of `sets`, all [N, d] and finite; `self.sets` are arguments of its methods.

    half: distances in float16, see above. block: (rows, columns), for speed and memory only."""

    def __init__(self, *sets: np.ndarray, half: bool = False, block: tuple[int, int] = (ROWS, COLS),
                 devices: Sequence | None = None):
        if min(block) < 1:
            raise UserError(f'got a block of {block[0]} x {block[1]} pairs, expected at least 1 x 1')
        self.half, self._shape = half, block
        self._devices = list(jax.local_devices() if devices is None else devices)
        first = sets[0]
        origin = np.median(first[::-(-len(first) // 1024)].astype(np.float64), axis=0)
        farthest = max(np.abs(rows[start:start + CHUNK] - origin).max()
                       for rows in sets for start in range(0, len(rows), CHUNK))
        scale = 2.0 ** -np.clip(np.frexp(farthest)[1], -500, 500)
        self.sets = [Rows(rows, origin, scale, half) for rows in sets]

    def neighbour_distances(self, rows: Rows, k: int) -> np.ndarray:
        """Squared distance of every row to its k-th nearest other row: float64 [N], N > k."""
        if len(rows) <= k:
            raise UserError(f'{len(rows)} rows do not have {k} neighbours each; draw at least {k + 1}')
        keep, radii = k + 1 + SPARE, np.empty(len(rows))
        unsure = []
        for ids, tiles in self._tiles(rows, rows, functools.partial(_smallest, keep=keep)):
            low, columns = _merge(tiles, len(ids), keep)
            found = np.isfinite(low)
            near = np.full(low.shape, np.inf)
            near[found] = self.exact(rows, rows, np.repeat(ids, keep)[found.ravel()], columns[found])
            radii[ids] = np.sort(near, axis=1)[:, k]
            # A pair that was dropped is at least as far as the last lower bound that was kept.
            unsure.append(ids[radii[ids] > low[:, -1]])
        unsure = np.concatenate(unsure)
        if len(unsure):
            radii[unsure] = self._second_look(rows, unsure, radii[unsure], k)
        return radii

    def counts_within(self, rows: Rows, cols: Rows, *, row_radii: np.ndarray | None = None,
                      col_radii: np.ndarray | None = None, closed: bool = True, every: bool = True,
                      columns_first: bool = False) -> np.ndarray:
        """Number of columns within a squared radius of each row: int64 [rows].

        Args:
            row_radii, col_radii: a radius for each row, or for each column.
            closed: `<=`, else `<`.
            every: False only distinguishes zero from more.
            columns_first: the columns are the first argument of `exact`."""
        radii = [np.full(len(side), np.inf) if given is None else given
                 for side, given in ((rows, row_radii), (cols, col_radii))]
        counts = np.zeros(len(rows), np.int64)
        function = functools.partial(_compare, closed=closed, columns_first=columns_first)
        inside = np.less_equal if closed else np.less
        for ids, tiles in self._tiles(rows, cols, function, radii):
            for tile in tiles:
                counts[ids] += np.asarray(tile.result[0])[:len(ids)]
            for tile in tiles:
                _, unsure, any_unsure = tile.result
                if not any_unsure:
                    continue
                i, j = np.nonzero(np.asarray(unsure)[:len(ids)] & (every | (counts[ids] == 0))[:, None])
                for now in _rounds(i, counts, ids, every):
                    a, b = ids[i[now]], tile.first + j[now]
                    exact = self.exact(cols, rows, b, a) if columns_first else self.exact(rows, cols, a, b)
                    np.add.at(counts, a, inside(exact, np.minimum(radii[0][a], radii[1][b])))
        return counts

    def exact(self, first: Rows, second: Rows, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The squared distances that define every answer, of rows i of one set and rows j of another.

        Float16 form: Σu², Σv² and Σuv of float16 rows, each rounded; then (Σu² - 2Σuv) + Σv², twice."""
        out = np.empty(len(i))
        for start in range(0, len(i), PAIRS):
            part = slice(start, start + PAIRS)
            u, v = first.raw[i[part]], second.raw[j[part]]
            out[part] = np.square(u.astype(np.float64) - v).sum(axis=1)
            if self.half:
                small = _fits_half(first.longest[i[part] // ADM_BLOCK], second.longest[j[part] // ADM_BLOCK])
                out[part][small] = _half_distances(u[small], v[small])
        return out

    def _second_look(self, rows: Rows, ids: np.ndarray, limits: np.ndarray, k: int) -> np.ndarray:
        """`neighbour_distances` of rows `ids`, from every pair whose lower bound is within `limits`."""
        best = np.full((len(ids), k + 1), np.inf)
        position = np.full(len(rows), -1)
        position[ids] = np.arange(len(ids))
        radii = np.full(len(rows), np.inf)
        radii[ids] = limits
        for chosen, tiles in self._tiles(rows, rows, _below, (radii, np.full(len(rows), np.inf)), ids):
            for tile in tiles:
                i, j = np.nonzero(np.asarray(tile.result)[:len(chosen)])
                exact = self.exact(rows, rows, chosen[i], tile.first + j)
                order = np.lexsort((exact, i))
                i, exact = i[order], exact[order]
                rank = np.arange(len(i)) - np.searchsorted(i, i)
                near = np.full((len(chosen), k + 1), np.inf)
                near[i[rank <= k], rank[rank <= k]] = exact[rank <= k]
                here = position[chosen]
                best[here] = np.sort(np.concatenate([best[here], near], axis=1), axis=1)[:, :k + 1]
        return best[:, k]

    def _tiles(self, rows: Rows, cols: Rows, function: Callable, radii=None,
               ids: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, list['Tile']]]:
        """For each block of rows: their ids, and function(rows, columns, half=...) for all column blocks.

        Column block b stays on device b modulo their number. The next block of rows is computed ahead."""
        row_radii, col_radii = radii or (np.full(len(rows), np.inf), np.full(len(cols), np.inf))
        ids = np.arange(len(rows)) if ids is None else ids
        height, width = min(self._shape[0], len(ids)), min(self._shape[1], len(cols))
        held = {}

        def column_block(number: int, part: np.ndarray, half: bool) -> Block:
            if (number, half) not in held:
                block = cols.block(part, col_radii[part], width, half)
                held[number, half] = jax.device_put(block, self._devices[number % len(self._devices)])
            return held[number, half]

        def start(part: np.ndarray) -> list[Tile]:
            placed, tiles = {}, []
            for number, columns in enumerate(self._parts(np.arange(len(cols)), width)):
                half = self.half and bool(_fits_half(rows.longest[part[0] // ADM_BLOCK],
                                                     cols.longest[columns[0] // ADM_BLOCK]))
                device = self._devices[number % len(self._devices)]
                if (device, half) not in placed:
                    placed[device, half] = jax.device_put(rows.block(part, row_radii[part], height, half),
                                                          device)
                result = function(placed[device, half], column_block(number, columns, half), half=half)
                tiles.append(Tile(result, int(columns[0]), 1.0 if half else rows.scale ** 2))
            return tiles

        return start_ahead(self._parts(ids, height), start, count=1)

    def _parts(self, ids: np.ndarray, size: int) -> list[np.ndarray]:
        """Runs of at most `size` ids; with `half`, none crosses the border of one of ADM's blocks."""
        whole = np.split(ids, np.flatnonzero(np.diff(ids // ADM_BLOCK)) + 1) if self.half else [ids]
        return [run[start:start + size] for run in whole for start in range(0, len(run), size)]


class Tile(NamedTuple):
    """The result for one block of pairs, its first column, and the scale of its squared distances."""
    result: object
    first: int
    scale: float


def _bounds(rows: Block, cols: Block, half: bool, columns_first: bool = False) -> tuple[Array, Array]:
    """(lower, upper) bound of the squared distance of every pair, float32 [rows, cols]."""
    product = jnp.matmul(rows.x, cols.x.T, precision=jax.lax.Precision.HIGHEST)
    row_norm, col_norm = rows.norm[:, None], cols.norm
    spread = row_norm + col_norm
    slack = (rows.x.shape[1] + 64) * 2.0 ** -24 * spread + TINY
    if not half:
        distance = spread - 2 * product
        return distance - slack, distance + slack
    first, second = (col_norm, row_norm) if columns_first else (row_norm, col_norm)
    slack = slack + HALF_NORMAL
    low = _half(_half(first - 2 * _half(product + slack, 1), -1) + second, -1)
    high = _half(_half(first - 2 * _half(product - slack, -1), 1) + second, 1)
    return jnp.maximum(low, 0), jnp.maximum(high, 0)


def _half(x: Array, side: int) -> Array:
    """float32 values rounded to float16; subnormals become a bound below (side -1) or above (1) them."""
    rounded = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(rounded) < HALF_NORMAL, side * HALF_NORMAL, rounded)


@functools.partial(jax.jit, static_argnames=('keep', 'half'))
def _smallest(rows: Block, cols: Block, *, keep: int, half: bool) -> tuple[Array, Array]:
    """The `keep` smallest lower bounds of each row and their columns."""
    low = jnp.where(jnp.isneginf(cols.most), jnp.inf, _bounds(rows, cols, half)[0])
    value, column = jax.lax.top_k(-low, min(keep, low.shape[1]))
    return -value, column


@functools.partial(jax.jit, static_argnames=('closed', 'columns_first', 'half'))
def _compare(rows: Block, cols: Block, *, closed: bool, columns_first: bool,
             half: bool) -> tuple[Array, Array, Array]:
    """(number of pairs surely within the radius of each row; [rows, cols] undecided pairs; whether any)."""
    low, high = _bounds(rows, cols, half, columns_first)
    inside = jnp.less_equal if closed else jnp.less
    sure = inside(high, jnp.minimum(rows.least[:, None], cols.least))
    unsure = inside(low, jnp.minimum(rows.most[:, None], cols.most)) & ~sure
    return sure.sum(axis=1), unsure, unsure.any()


@functools.partial(jax.jit, static_argnames='half')
def _below(rows: Block, cols: Block, *, half: bool) -> Array:
    """[rows, cols] pairs that may lie within the radius."""
    return _bounds(rows, cols, half)[0] <= jnp.minimum(rows.most[:, None], cols.most)


def _merge(tiles: list[Tile], count: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` smallest lower bounds over all tiles, unscaled, ascending, and their columns."""
    low = [np.asarray(tile.result[0])[:count].astype(np.float64) / tile.scale for tile in tiles]
    columns = [np.asarray(tile.result[1])[:count] + tile.first for tile in tiles]
    low, columns = np.concatenate(low, axis=1), np.concatenate(columns, axis=1)
    if low.shape[1] < keep:
        missing = ((0, 0), (0, keep - low.shape[1]))
        low, columns = np.pad(low, missing, constant_values=np.inf), np.pad(columns, missing)
    order = np.argsort(low, axis=1, kind='stable')[:, :keep]
    return np.take_along_axis(low, order, axis=1), np.take_along_axis(columns, order, axis=1)


def _rounds(i: np.ndarray, counts: np.ndarray, ids: np.ndarray, every: bool) -> Iterator[np.ndarray]:
    """Which pairs of rows i (ascending) to compute next: all, or a few per row while its count is zero."""
    if every:
        yield np.arange(len(i))
        return
    left, reach = np.arange(len(i)), 1
    rank = left - np.searchsorted(i, i)
    while len(left):
        yield left[rank[left] < reach]
        left = left[(rank[left] >= reach) & (counts[ids[i[left]]] == 0)]
        reach *= 4


def _half_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The float16 form of pairs of rows [n, d]: numpy rounds every float16 operation."""
    u, v = u.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
    u_norm, v_norm, product = (sums.sum(axis=1).astype(np.float16) for sums in (u * u, v * v, u * v))
    return np.maximum(u_norm - product * np.float16(2) + v_norm, np.float16(0)).astype(np.float64)


def _fits_half(longest: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether no distance of rows of these lengths overflows: |u - v|² <= (|u| + |v|)², with a margin."""
    return np.square(longest + other) < HALF_MAX * 0.99


def _longest(rows: np.ndarray) -> float:
    return max(np.sqrt(np.square(rows[start:start + CHUNK], dtype=np.float64).sum(axis=1)).max()
               for start in range(0, len(rows), CHUNK))


def _float32_towards(values: np.ndarray, side: float) -> np.ndarray:
    """The float32 nearest to float64 values on the side of -inf or inf; equal where it can be."""
    with np.errstate(over='ignore'):
        out = values.astype(np.float32)
    beyond = out > values if side < 0 else out < values
    return np.where(beyond, np.nextafter(out, np.float32(side)), out)
