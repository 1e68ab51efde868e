"""Precision, recall, density and coverage: how real samples look and how much of the real set they cover.

Precision and recall (Kynkäänniemi et al. 2019) as in the ADM evaluator: around every row is a ball that
reaches to its 3rd nearest other row of its own set. Precision is the share of samples in at least one
reference ball, recall the share of reference rows in at least one sample ball; a row on the surface is in the
ball. The sets may differ in size (ADM: 10000 reference images, 50000 samples). Density and coverage (Naeem et
al. 2020) use balls around reference rows only, by default to the 5th neighbour, and a row on the surface is
not in the ball, as in the authors' package.

Counts are those of float64 for any block size and any devices, see `lit_jax.metrics.distances`."""
from collections.abc import Sequence
from typing import NamedTuple

from lit_jax.metrics.checks import check_pair
from lit_jax.metrics.distances import COLS, ROWS, Geometry
from lit_jax.runtime.errors import UserError, shown

MODES = ('float32', 'adm_float16')


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density may exceed 1."""
    density: float
    coverage: float


def precision_recall(samples, reference, *, neighbours: int = 3, mode: str = 'float32',
                     block: tuple[int, int] = (ROWS, COLS),
                     devices: Sequence | None = None) -> PrecisionRecall:
    """Precision and recall of features [N, d] and [M, d], each with more rows than `neighbours`.

    mode: 'float32' gives the exact counts. 'adm_float16' rounds distances to float16 as the ADM evaluator
        does, for comparison with published numbers: both scores move by up to half a percent, in either
        direction. As the order in which TensorFlow adds float16 is unknown, a sample or two may differ."""
    if mode not in MODES:
        raise UserError(f'mode is {shown(mode)}, expected one of {", ".join(MODES)}')
    samples, reference = check_pair(samples, reference, _least(neighbours))
    geometry = Geometry(reference, samples, half=mode == 'adm_float16', block=block, devices=devices)
    real, fake = geometry.sets
    real_radii = geometry.neighbour_distances(real, neighbours)
    fake_radii = geometry.neighbour_distances(fake, neighbours)
    # The ADM evaluator adds the norms of the reference first.
    precise = geometry.counts_within(fake, real, col_radii=real_radii, every=False, columns_first=True)
    recalled = geometry.counts_within(real, fake, col_radii=fake_radii, every=False)
    return PrecisionRecall(float((precise > 0).mean()), float((recalled > 0).mean()))


def density_coverage(samples, reference, *, neighbours: int = 5, block: tuple[int, int] = (ROWS, COLS),
                     devices: Sequence | None = None) -> DensityCoverage:
    """Density: reference balls per sample, over `neighbours`. Coverage: share of balls with a sample."""
    samples, reference = check_pair(samples, reference, _least(neighbours))
    geometry = Geometry(reference, samples, block=block, devices=devices)
    real, fake = geometry.sets
    radii = geometry.neighbour_distances(real, neighbours)
    inside = geometry.counts_within(real, fake, row_radii=radii, closed=False)
    return DensityCoverage(float(inside.sum() / (neighbours * len(samples))), float((inside > 0).mean()))


def _least(neighbours: int) -> int:
    if neighbours < 1:
        raise UserError(f'neighbours is {neighbours}, expected at least 1')
    return neighbours + 1
