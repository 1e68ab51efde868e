"""The kernel distance, KID for pool features and sKID for spatial ones: an unbiased estimate of the squared
maximum mean discrepancy under k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018), averaged over random subsets.

The score may be negative. Subsets are drawn as in torch-fidelity: numpy's RandomState of one seed; for each
subset first the samples, then the reference, without replacement. float64 on the host, in turn."""
import numpy as np

from lit_jax.metrics.checks import check_pair
from lit_jax.runtime.errors import UserError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


def kernel_distance(samples, reference, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE,
                    seed: int = SEED) -> tuple[float, float]:
    """(mean, population standard deviation) over subsets, for features [N, d] and [M, d].

    UserError if a set has fewer rows than `subset_size`: give a smaller size and report it with the score.
    The mean estimates the same number for any size, with more noise for smaller ones."""
    samples, reference = check_pair(samples, reference)
    smallest = min(len(samples), len(reference))
    if subsets < 1 or subset_size < 2:
        raise UserError(f'got {subsets} subsets of {subset_size}, expected at least 1 of at least 2')
    if subset_size > smallest:
        raise UserError(f'subsets of {subset_size} do not fit {len(samples)} samples and {len(reference)} '
                        f'reference rows; draw more, or pass subset_size={smallest} and report that')
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), subset_size, replace=False)].astype(np.float64)
        values.append(_squared_discrepancy(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, for x and y [m, d]: the kernel of a row with itself is left out."""
    m = len(x)
    within = (_off_diagonal_sum(x) + _off_diagonal_sum(y)) / (m * (m - 1))
    return float(within - 2 * _kernel(x, y).sum() / (m * m))


def _off_diagonal_sum(x: np.ndarray) -> float:
    kernel = _kernel(x, x)
    np.fill_diagonal(kernel, 0)
    return kernel.sum()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product = x @ y.T
    product /= x.shape[1]
    product += 1
    return product * product * product
