"""The Inception Score (Salimans et al. 2016): exp of the mean divergence of each image's class probabilities
from the mean probabilities of its chunk, averaged over chunks.

The ADM evaluator takes chunks of 5000 in file order, a short last one counting as a full one; torch-fidelity
shuffles with a fixed seed and cuts into 10 equal chunks. Both leave out the bias of the last layer. In file
order, images sorted by class score far too low (`sorted_by_class` detects this). float64 on the host; ADM's
float32 probabilities change the score by about 1e-7."""
import numpy as np

from lit_jax.metrics.checks import check_features
from lit_jax.runtime.errors import UserError

ADM_SPLIT = 5000
FIDELITY_SEED, FIDELITY_SPLITS = 2020, 10


def inception_score(pool, head_kernel, *, split_size: int = ADM_SPLIT, shuffle_seed: int | None = None,
                    splits: int | None = None) -> tuple[float, float]:
    """(mean, population standard deviation) of the score over chunks.

    Args:
        pool: features [N, d] in file order, d = 2048 for FID's Inception.
        head_kernel: [d, classes], the last layer without its bias; None if `pool` already has the logits.
        split_size: images per chunk (ADM: 5000), unless `splits` is given.
        shuffle_seed: seed of numpy's RandomState for a shuffle (torch-fidelity: 2020); None: file order.
        splits: number of chunks, of equal size up to one (torch-fidelity: 10)."""
    pool = check_features(pool, least=1)
    kernel = None if head_kernel is None else np.asarray(head_kernel, np.float64)
    if kernel is not None and (kernel.ndim != 2 or len(kernel) != pool.shape[1]):
        raise UserError(f'head_kernel has shape {kernel.shape}, expected [{pool.shape[1]}, classes] for '
                        f'features {pool.shape}; pass the last layer of the network that gave the features')
    order = np.arange(len(pool))
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(len(pool))
    scores = [_chunk_score(pool[order[start:stop]], kernel)
              for start, stop in _chunks(len(pool), split_size, splits)]
    return float(np.mean(scores)), float(np.std(scores))


def sorted_by_class(labels) -> bool:
    """Whether labels [N] come in long runs: neighbours are equal at least halfway from chance to always."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UserError(f'labels have shape {labels.shape}, expected [N]: one class index per image')
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2:
        return False
    by_chance = np.square(counts / len(labels)).sum()
    # If every class comes once or twice, there is nothing to sort.
    repeats = (labels[1:] == labels[:-1]).mean()
    return bool(counts.mean() > 2 and repeats >= (1 + by_chance) / 2)


def _chunks(count: int, split_size: int, splits: int | None) -> list[tuple[int, int]]:
    if splits is None:
        if split_size < 1:
            raise UserError(f'split_size must be at least 1, got {split_size}; ADM uses {ADM_SPLIT}')
        return [(start, min(start + split_size, count)) for start in range(0, count, split_size)]
    if not 1 <= splits <= count:
        raise UserError(f'{count} images cannot be cut into {splits} chunks; ask for 1 to {count}')
    return [(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def _chunk_score(pool: np.ndarray, kernel: np.ndarray | None) -> float:
    logits = pool.astype(np.float64)
    if kernel is not None:
        logits = logits @ kernel
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    # A class with probability 0 everywhere adds nothing; its logarithm must not be taken.
    mean = p.mean(axis=0)
    log_mean = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
