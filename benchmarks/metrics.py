"""Measures time and peak memory of each metric, on random features of the size of a full evaluation.

    python -m benchmarks.metrics  # 50000 samples against 10000 references, 2048 dimensions
    python -m benchmarks.metrics --samples 5000 --only precision_recall,kid

The features are non-negative, with 30 directions of spread, and noise in all dimensions. Peak memory is the
host memory of the whole process so far, 0.5 GiB of which are the features in the full case.
"""
import resource
import time

import numpy as np

from benchmarks.timing import make_parser

CLASSES = 1008
LATENT = 30


def features(seed: int, count: int, dims: int, spread: float) -> np.ndarray:
    """float32 [count, dims], filled in parts to save memory."""
    directions = 0.3 * np.random.default_rng(0).standard_normal((LATENT, dims), np.float32)
    rng, out = np.random.default_rng(seed), np.empty((count, dims), np.float32)
    for start in range(0, count, 1000):
        rows = out[start:start + 1000]
        latent = spread * rng.standard_normal((len(rows), LATENT), np.float32)
        np.maximum(0.5 + latent @ directions + 0.2 * rng.standard_normal(rows.shape, np.float32), 0, out=rows)
    return out


def metrics(samples: np.ndarray, reference: np.ndarray) -> dict:
    """Name -> function without arguments."""
    from lit_jax.metrics.frechet import frechet_distance, statistics
    from lit_jax.metrics.inception_score import inception_score
    from lit_jax.metrics.kernel import kernel_distance
    from lit_jax.metrics.manifold import density_coverage, precision_recall
    kernel = 0.1 * np.random.default_rng(1).standard_normal((samples.shape[1], CLASSES), np.float32)
    size = min(1000, len(samples), len(reference))
    return {
        'precision_recall': lambda: precision_recall(samples, reference),
        'precision_recall_float16': lambda: precision_recall(samples, reference, mode='adm_float16'),
        'density_coverage': lambda: density_coverage(samples, reference),
        'fid': lambda: frechet_distance(statistics(samples), statistics(reference)),
        'is': lambda: inception_score(samples, kernel),
        'kid': lambda: kernel_distance(samples, reference, subset_size=size),
    }


def main():
    parser = make_parser(__doc__)
    parser.add_argument('--samples', type=int, default=50000)
    parser.add_argument('--reference', type=int, default=10000)
    parser.add_argument('--dims', type=int, default=2048)
    parser.add_argument('--only', default='', help='names, comma separated (default: all)')
    args = parser.parse_args()
    samples = features(1, args.samples, args.dims, 1.1)
    chosen = metrics(samples, features(2, args.reference, args.dims, 1.0))
    names = args.only.split(',') if args.only else list(chosen)
    if unknown := sorted(set(names) - set(chosen)):
        parser.error(f'unknown --only={",".join(unknown)}; known: {", ".join(chosen)}')
    for name in names:
        began = time.perf_counter()
        value = chosen[name]()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f'{name:26s} {seconds:8.1f} s   peak {peak:5.2f} GiB   {value}', flush=True)


if __name__ == '__main__':
    main()
