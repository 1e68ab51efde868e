"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982): a matrix
moves along the nearest semi-orthogonal matrix to its momentum, so that all directions learn at one pace.

It updates the kernels of products in the blocks; Adam updates everything else (embedders, the last layer,
depth-wise convolutions, biases and gains). Updates are scaled to a root mean square of 0.2, about that of
Adam's (Liu et al., eq. 4), so that one learning rate serves both."""
import functools
import math
import re
from collections.abc import Mapping

import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lit_jax.runtime.leaves import map_named
from lit_jax.training.matrices import STACKS, matrix_axes

MOMENTUM = 0.95
RMS = 0.2               # of an update's entries
DEPTH_WISE = r'/(dwc|depth)/'


def scale_by_muon_and_adam(adam: optax.GradientTransformation,
                           arch: Mapping | None = None) -> optax.GradientTransformation:
    """Before the learning rate. adam: for the leaves that are not Muon's. arch: of the model."""
    def numbers(path, leaf):
        axes = matrix_axes(path, leaf.ndim, arch)
        return MuonDimensionNumbers(axes.rows, axes.columns)

    def scaled(path, leaf):
        """Entries of a semi-orthogonal matrix have the root mean square 1/sqrt(max(inputs, outputs))."""
        axes = matrix_axes(path, leaf.ndim, arch)
        inputs, outputs = (math.prod(leaf.shape[axis] for axis in part) for part in (axes.rows, axes.columns))
        return RMS * max(inputs, outputs) ** 0.5 * leaf

    def label(path, leaf):
        return 'muon' if is_for_muon(path, leaf.ndim, arch) else 'adam'

    numbered = functools.partial(map_named, numbers)
    muon = optax.chain(scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=numbered),
                       optax.stateless(lambda updates, params=None: map_named(scaled, updates)))
    return optax.partition({'muon': muon, 'adam': adam}, functools.partial(map_named, label))


def is_for_muon(path: str, rank: int, arch: Mapping | None = None) -> bool:
    """Whether a leaf is a matrix (or several) that tokens are multiplied with."""
    return bool(re.search(STACKS, path)) and path.endswith('/kernel') and not re.search(DEPTH_WISE, path) \
        and matrix_axes(path, rank, arch).is_matrix
