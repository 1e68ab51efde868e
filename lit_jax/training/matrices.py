"""Leaves of the parameters as matrices, for optimizers that treat a matrix as one: its input axes against its
output axes, flattened as PyTorch would hold it, one matrix for each layer of a stack."""
import re
from typing import NamedTuple

STACKS = r'^(blocks|joins)\d*/'                      # one layer axis in front
VECTORS = r'(^|[/_])(bias|gain|gamma|factor|focus_scale)$'
# (pattern of the path, number of input axes; -1: all but the last). Others have one.
INPUT_AXES = (
    (r'attn/(dwc|compressor|[kv])/kernel$|attn/dwc/(square|column|row)$', 2),
    (r'blocks\d*/dwc/kernel$|mlp/depth/kernel$', 2),
    (r'(attn|cross_attn)/proj/kernel$|x_embedder/kernel$|down\d/kernel$', -1),
    (r'fusion/(compress|restore)/kernel$', -1),
)
# several matrices a layer, along an axis behind the layer axis
BANKS = r'attn/routed_[qk]/kernel$'


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


def matrix_axes(path: str, rank: int) -> MatrixAxes:
    """How the leaf at `path`, an array of so many axes, is read; vectors have no rows."""
    first = min(rank, bool(re.search(STACKS, path)) + bool(re.search(BANKS, path)))
    inner = tuple(range(first, rank))
    count = next((count for pattern, count in INPUT_AXES if re.search(pattern, path)), 1)
    if re.search(VECTORS, path) or len(inner) < 2:
        count = 0
    count = len(inner) - 1 if count < 0 else count
    return MatrixAxes(tuple(range(first)), inner[:count], inner[count:])
