"""The product of rows with one of several matrices each, at the cost of one product.

Rows are sorted by their matrix. One sum in several forms, because none is fast everywhere (figures:
`benchmarks/routing.py`):

- `loop`: groups are padded to whole blocks, and a loop multiplies each block with its matrix. The default on
  CPU, where XLA turns `jax.lax.ragged_dot` into a product of all rows with all matrices.
- `ragged`: `jax.lax.ragged_dot`, for which the TPU compiler has a kernel. Its gradient by the matrices is the
  loop's, since there the compiler would multiply all with all. The default elsewhere.
- `batched`: the blocks, and a copy of its matrix for each, as one batched product. For GPUs, which have
  neither a cheap loop nor, without a flag, a kernel."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.layers import Array
from lit_jax.runtime.dtypes import accumulator

CPU_ROWS = 128       # of a block at most: a block and its matrix should stay in cache
WIDE_ROWS = 512      # the same for accelerators, whose matrix units need more


def grouped_product(x_MD: Array, kernel_PDF: Array, index_M: Array, form: str | None = None) -> Array:
    """y[m] = x[m]·kernel[index[m]], [M, F] in the dtype of x; sums in the accumulator; memory grows with
    M, not M·P. `form`: a key of FORMS; None is the platform's. First derivatives only."""
    return _product(form, x_MD, kernel_PDF, index_M)


def _forward(form, x, kernel, index):
    return _by_platform(form, 0, x, kernel, index), (x, kernel, index)


def _tangent(form, residuals, tangents):
    (x, kernel, index), (dx, dkernel, _) = residuals, tangents
    return _by_platform(form, 0, dx, kernel, index) + _by_platform(form, 0, x, dkernel, index)


def _backward(form, residuals, g_MF):
    dx, dkernel = _by_platform(form, 1, *residuals, g_MF)
    return dx, dkernel, None


_product = with_derivatives(_forward, _tangent, _backward, static=1)


def _by_platform(form: str | None, direction: int, *args):
    """The form asked for, or the platform's, decided when the program is lowered."""
    if form is not None:
        return FORMS[form][direction](*args)
    if not isinstance(args[0].shape[0], int):      # exported for any number of rows
        return _dense(*args)
    forms = {'cpu': 'loop', 'default': 'ragged'}
    if jax.default_backend() == 'gpu':      # only where there is one: elsewhere it is not lowered for GPUs
        forms |= {'cuda': 'batched', 'rocm': 'batched'}
    return jax.lax.platform_dependent(*args, **{name: FORMS[form][direction] for name, form in forms.items()})


class Blocks(NamedTuple):
    """Rows in blocks of `rows` rows so that each block belongs to one matrix.

    source [blocks·rows]: the row at each place of the blocks, M where it is empty. place [M]: the place of
    each row. owner [blocks]: the matrix of each block. used: how many blocks hold any row."""
    source: Array
    place: Array
    owner: Array
    used: Array


def _rows_of_block(m: int, choices: int, most: int) -> int:
    """A power of two, 8 to `most`: a quarter to half of an average group, to limit the padding."""
    rows = 8
    while rows < most and 4 * rows * choices <= m:
        rows *= 2
    return rows


def sort_rows(index_M: Array, choices: int, rows: int) -> Blocks:
    """The rows sorted by their matrix, each group padded to whole blocks: at most M/rows + choices."""
    m, index = index_M.size, index_M.astype(jnp.int32)
    counts = jnp.zeros(choices, jnp.int32).at[index].add(1)
    blocks_of = -(-counts // rows)
    ends = jnp.cumsum(blocks_of)
    order = jnp.argsort(index, stable=True).astype(jnp.int32)
    # The i-th of the sorted rows is number i - (rows of the groups before) of its group.
    shift = (ends - blocks_of) * rows - (jnp.cumsum(counts) - counts)
    place_sorted = jnp.arange(m, dtype=jnp.int32) + shift[index[order]]
    most = -(-m // rows) + choices - 1
    source = jnp.full(most * rows, m, jnp.int32).at[place_sorted].set(order, unique_indices=True)
    place = jnp.zeros(m, jnp.int32).at[order].set(place_sorted, unique_indices=True)
    owner = jnp.searchsorted(ends, jnp.arange(most, dtype=jnp.int32), side='right')
    return Blocks(source, place, jnp.minimum(owner, choices - 1), ends[-1])


def _gather(x_MD: Array, blocks: Blocks) -> Array:
    """[blocks, rows, D], zeros in the empty places."""
    x = jnp.take(x_MD, blocks.source, axis=0, mode='fill', fill_value=0)
    return x.reshape(blocks.owner.size, -1, x_MD.shape[1])


def _scatter(x_SRF: Array, blocks: Blocks) -> Array:
    """The rows back in their own order, [M, F]."""
    return x_SRF.reshape(-1, x_SRF.shape[-1])[blocks.place]


def _dot(x: Array, y: Array, contract: tuple[int, int], acc) -> Array:
    return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=acc)


def _at(array: Array, i) -> Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)


def _loop_product(blocks: Blocks, x_SRD: Array, kernel: Array, axis: int) -> Array:
    """Each block times its matrix, summed over this axis of the matrix. Only used blocks are computed."""
    def multiply(i, y):
        block = _dot(_at(x_SRD, i), _at(kernel, blocks.owner[i]), (1, axis), accumulator(x_SRD.dtype))
        return jax.lax.dynamic_update_index_in_dim(y, block.astype(y.dtype), i, 0)

    empty = jnp.zeros((*x_SRD.shape[:2], kernel.shape[2 - axis]), x_SRD.dtype)
    return jax.lax.fori_loop(0, blocks.used, multiply, empty)


def _loop_outer(blocks: Blocks, x_SRD: Array, g_SRF: Array, choices: int) -> Array:
    """Σ over the blocks of a matrix of xᵀ·g, [P, D, F] in the accumulator."""
    acc = accumulator(x_SRD.dtype)

    def add(i, total):
        part = _at(total, blocks.owner[i]) + _dot(_at(x_SRD, i), _at(g_SRF, i), (0, 0), acc)
        return jax.lax.dynamic_update_index_in_dim(total, part, blocks.owner[i], 0)

    return jax.lax.fori_loop(0, blocks.used, add, jnp.zeros((choices, x_SRD.shape[-1], g_SRF.shape[-1]), acc))


def _loop(x, kernel, index):
    blocks = sort_rows(index, len(kernel), _rows_of_block(len(x), len(kernel), CPU_ROWS))
    return _scatter(_loop_product(blocks, _gather(x, blocks), kernel, 0), blocks)


def _loop_backward(x, kernel, index, g):
    blocks = sort_rows(index, len(kernel), _rows_of_block(len(x), len(kernel), CPU_ROWS))
    x_SRD, g_SRF = _gather(x, blocks), _gather(g, blocks)
    dx = _scatter(_loop_product(blocks, g_SRF, kernel, 1), blocks)
    return dx, _loop_outer(blocks, x_SRD, g_SRF, len(kernel)).astype(kernel.dtype)


def _ragged(x, kernel, index):
    order = jnp.argsort(index, stable=True)
    sizes = jnp.zeros(len(kernel), jnp.int32).at[index].add(1)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    y = jax.lax.ragged_dot(x[order], kernel, sizes, preferred_element_type=accumulator(x.dtype))
    return y.astype(x.dtype)[back]


def _ragged_backward(x, kernel, index, g):
    blocks = sort_rows(index, len(kernel), _rows_of_block(len(x), len(kernel), WIDE_ROWS))
    dkernel = _loop_outer(blocks, _gather(x, blocks), _gather(g, blocks), len(kernel))
    return _ragged(g, jnp.swapaxes(kernel, 1, 2), index), dkernel.astype(kernel.dtype)


def _batched(x, kernel, index):
    blocks = sort_rows(index, len(kernel), _rows_of_block(len(x), len(kernel), WIDE_ROWS))
    y = jnp.einsum('srd,sdf->srf', _gather(x, blocks), kernel[blocks.owner],
                   preferred_element_type=accumulator(x.dtype))
    return _scatter(y.astype(x.dtype), blocks)


def _batched_backward(x, kernel, index, g):
    acc = accumulator(x.dtype)
    blocks = sort_rows(index, len(kernel), _rows_of_block(len(x), len(kernel), WIDE_ROWS))
    x_SRD, g_SRF = _gather(x, blocks), _gather(g, blocks)
    dx = jnp.einsum('srf,sdf->srd', g_SRF, kernel[blocks.owner], preferred_element_type=acc).astype(x.dtype)
    outer = jnp.einsum('srd,srf->sdf', x_SRD, g_SRF, preferred_element_type=acc)
    dkernel = jax.ops.segment_sum(outer, blocks.owner, len(kernel), indices_are_sorted=True)
    return _scatter(dx, blocks), dkernel.astype(kernel.dtype)


def _dense(x, kernel, index):
    """All rows with all matrices, for programs whose number of rows is not known."""
    y_MPF = jnp.einsum('md,pdf->mpf', x, kernel, preferred_element_type=accumulator(x.dtype))
    chosen_MP1 = (index[:, None] == jnp.arange(len(kernel)))[..., None]
    return jnp.where(chosen_MP1, y_MPF, 0).sum(1).astype(x.dtype)


# name -> (forward(x, kernel, index), backward(x, kernel, index, g) -> cotangents of x and kernel)
FORMS = {'loop': (_loop, _loop_backward), 'ragged': (_ragged, _ragged_backward),
         'batched': (_batched, _batched_backward)}
