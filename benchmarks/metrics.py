"""Time and peak memory of every metric on features of the size of a full evaluation; no network and no
images.

    python benchmarks/metrics.py  # 50000 samples against 10000 references, 2048 dimensions
    python benchmarks/metrics.py --samples 5000 --only precision_recall,kid

Features are made up: non-negative, 30 directions of spread and noise in all of them. Peak memory is that of
the whole process up to then (its features alone take 0.5 GiB in the full case), on the host: an accelerator's
own is not in it.
"""
import argparse
import resource
import time

import numpy as np

CLASSES = 1008
LATENT = 30


def features(seed: int, count: int, dims: int, spread: float) -> np.ndarray:
    """float32 [count, dims], filled in parts so that making them takes no memory of its own."""
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, default=50000)
    parser.add_argument('--reference', type=int, default=10000)
    parser.add_argument('--dims', type=int, default=2048)
    parser.add_argument('--only', default='', help='names with commas between; default all')
    args = parser.parse_args()
    samples, reference = features(1, args.samples, args.dims,
                                  1.1), features(2, args.reference, args.dims, 1.0)
    chosen = metrics(samples, reference)
    names = args.only.split(',') if args.only else list(chosen)
    unknown = sorted(set(names) - set(chosen))
    if unknown:
        parser.error(f'--only knows {", ".join(chosen)}; got {", ".join(unknown)}')
    for name in names:
        began = time.perf_counter()
        value = chosen[name]()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f'{name:26s} {seconds:8.1f} s   peak {peak:5.2f} GiB   {value}', flush=True)


if __name__ == '__main__':
    main()
