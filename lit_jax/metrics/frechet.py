"""The Fréchet distance between two sets of features, each taken as a Gaussian (Dowson & Landau 1982).

    d² = ‖μ₁ - μ₂‖² + tr(Σ₁) + tr(Σ₂) - 2·tr((Σ₁^½ Σ₂ Σ₁^½)^½)

With Inception features this is FID (pool features) or sFID (spatial features). The last trace is the sum of
the singular values of Σ₁^½ Σ₂^½. With Σ = V diag(λ) Vᵀ these are the singular values of diag(√λ₁) V₁ᵀV₂
diag(√λ₂), which needs no matrix root and no product in which small values vanish. Directions without spread
are left out: an eigenvalue below the rounding error of the largest counts as zero, as its root would be 1e-8
of the largest. So fewer samples than dimensions are no special case. float64 on the host."""
from typing import NamedTuple

import numpy as np

from lit_jax.metrics.checks import CHUNK, check_features
from lit_jax.runtime.errors import UserError


class Statistics(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64, and their number if known."""
    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None


class RunningStatistics:
    """Statistics of features in parts of any sizes, from any hosts: `add` parts, and `merge` results.

    Every part is centred by its own mean, and parts are joined by the pairwise update of Chan, Golub &
    LeVeque (1979), so a mean far from zero costs no digits. Memory: one [d, d] float64 matrix."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def add(self, features) -> None:
        """Features [n, d], n >= 1. UserError as for `check_features`, or for another d than before."""
        features = check_features(features, least=1)
        for start in range(0, len(features), CHUNK):
            part = features[start:start + CHUNK].astype(np.float64)
            mean = part.mean(axis=0)
            part -= mean
            self._join(len(part), mean, part.T @ part)

    def merge(self, other: 'RunningStatistics') -> None:
        """Adds the features that `other` was given."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def result(self) -> Statistics:
        if self.count < 2:
            raise UserError(f'a covariance needs at least 2 features, got {self.count}; draw more samples')
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self.mean.shape:
            raise UserError(f'this part has {mean.size} dimensions, the ones before {self.mean.size}; '
                            'compute all with the same feature extractor')
        total, delta = self.count + count, mean - self.mean
        self.scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def statistics(features: np.ndarray, float32_mean: bool = False) -> Statistics:
    """Statistics of features [N, d], N >= 2. UserError as for `check_features`.

    float32_mean: as in the ADM evaluator, take the mean in float32 with numpy. Moves FID by about 1e-7 of its
        value; the covariance is float64 either way."""
    features = check_features(features)
    running = RunningStatistics()
    running.add(features)
    result = running.result()
    if float32_mean:
        return result._replace(mean=np.asarray(features, np.float32).mean(axis=0).astype(np.float64))
    return result


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """d² between two Gaussians; symmetric, and 0 for equal ones up to rounding (never below 0)."""
    _check_statistics(a)
    _check_statistics(b)
    if a.mean.shape != b.mean.shape:
        raise UserError(f'the two sets have features of {a.mean.size} and {b.mean.size} dimensions; '
                        'compute both with the same feature extractor')
    first, second = _factor(a), _factor(b)
    cross = np.linalg.svd(first.T @ second, compute_uv=False).sum() if first.size and second.size else 0.0
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    return float(max(distance, 0.0))


def _factor(stats: Statistics) -> np.ndarray:
    """F [d, r] with F Fᵀ = Σ and r its rank, float64: eigenvectors times roots of eigenvalues."""
    values, vectors = np.linalg.eigh((stats.cov + stats.cov.T) / 2)
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def _check_statistics(stats: Statistics) -> None:
    mean, cov = np.shape(stats.mean), np.shape(stats.cov)
    if len(mean) != 1 or cov != mean * 2:
        raise UserError(f'statistics have a mean of shape {mean} and a covariance of shape {cov}, expected '
                        '[d] and [d, d]; check that the reference file has statistics')
    if not (np.isfinite(stats.mean).all() and np.isfinite(stats.cov).all()):
        raise UserError('the mean or the covariance is not finite; compute the statistics again from finite '
                        'features')
