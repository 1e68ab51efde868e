"""Parameter leaves as matrices, for optimizers: input axes against output axes, flattened as in PyTorch, with
one matrix per layer of a stack."""
import re
from collections.abc import Mapping
from typing import NamedTuple

from lit_jax.models.arch import find_leaf

STACKS = r'^(blocks|joins)\d*/'                      # one layer axis in front
# Number of input axes (-1: all but the last) by the transform that a mixer or ffn declares for its leaf.
INPUTS = {'linear': 1, 'pointwise': 1, 'linear_in': -1, 'conv': -1, 'depthwise': 2, 'flat': 0, 'copy': 0}
# Of other leaves, by pattern of their path; default 1.
INPUT_AXES = ((r'(^|[/_])(bias|gain)$', 0), (r'/dwc/kernel$', 2),
              (r'/proj/kernel$|x_embedder/kernel$|down\d/kernel$', -1))


class MatrixAxes(NamedTuple):
    """Axes of a leaf: those that count matrices, those of rows (inputs) and of columns (outputs)."""
    layers: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return bool(self.rows and self.columns)

    @property
    def inner(self) -> tuple[int, ...]:
        return self.rows + self.columns


def matrix_axes(path: str, rank: int, arch: Mapping | None = None) -> MatrixAxes:
    """The axes of the leaf at `path`; vectors have no rows. arch: of its model."""
    leaf = find_leaf(arch, path) if arch else None
    first = min(rank, bool(re.search(STACKS, path)) + (leaf.banks if leaf else 0))
    inner = tuple(range(first, rank))
    count = INPUTS[leaf.transform] if leaf else next(
        (count for pattern, count in INPUT_AXES if re.search(pattern, path)), 1)
    if len(inner) < 2:
        count = 0
    count = len(inner) - 1 if count < 0 else count
    return MatrixAxes(tuple(range(first)), inner[:count], inner[count:])
