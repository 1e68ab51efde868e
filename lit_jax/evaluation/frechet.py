"""The Fréchet distance between two sets of features, each summed up as a Gaussian (Dowson & Landau 1982).

    d² = ‖μ₁ - μ₂‖² + tr(Σ₁) + tr(Σ₂) - 2·tr((Σ₁^½ Σ₂ Σ₁^½)^½)

With Inception features this number is FID. The matrix under the root is written in its symmetric form: its
eigenvalues are real and not negative whatever the rank, so fewer samples than dimensions need no special case, and
no small multiple of the identity is added. All in float64 numpy.
"""
from typing import NamedTuple

import numpy as np

from lit_jax.errors import UserError


class Statistics(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of a set of features, float64."""
    mean: np.ndarray
    cov: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """Statistics of features [N, d], N >= 2. UserError for another shape or for values that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f'features have shape {features.shape}, expected [N, d] with at least 2 rows; '
                        'flatten all axes but the first, or draw more samples')
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise UserError(f'{len(bad)} of {len(features)} feature rows are not finite (first: row {bad[0]}), '
                        'so the samples they come from are not: look at those before you measure them')
    mean = features.mean(axis=0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """d² between two Gaussians; symmetric, and 0 for equal ones up to rounding (never below 0)."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f'the two sets have features of {a.mean.size} and {b.mean.size} dimensions; '
                        'compute both with the same feature extractor')
    root = _symmetric_root(a.cov)
    cross = np.linalg.eigvalsh(_symmetric(root @ b.cov @ root))
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(max(np.square(a.mean - b.mean).sum() + trace, 0.0))


def _symmetric_root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance matrix; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = np.linalg.eigh(_symmetric(cov))
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2
