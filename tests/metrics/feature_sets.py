"""Feature sets for the tests of the metrics: the golden ones, and hard ones."""
import numpy as np
from goldens import weights

GOLDEN = ('features64', 'features_rank', 'features2048', 'features2023')


def golden(folder, name):
    """(samples, reference, arrays, meta) of one golden file."""
    meta, _, arrays = weights.load(folder / f'metrics_{name}.npz')
    case = meta['case']
    reference = weights.features(case['seed'], 'real', case['n_real'], case['d'])
    samples = weights.features(case['seed'], 'fake', case['n_fake'], case['d'], spread=1.25, noise=0.2)
    return samples, reference, arrays, meta


def golden_head(meta):
    """The last layer's matrix of a golden file."""
    spec = meta['softmax_W']
    return weights.tensor(spec['key'], spec['shape'], spec['seed'], spec['scale'])


def features(seed, count, dims, spread=1.0, offset=0.0):
    """float32 [count, dims], not negative: eight directions in common, and noise."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(min(8, dims), dims))
    mixed = spread * rng.normal(size=(count,
                                      len(directions))) @ directions / 2 + 0.3 * rng.normal(
                                          size=(count, dims))
    return np.maximum(mixed + 0.5 + offset, 0).astype(np.float32)


# Name -> (samples, reference).
HARD = {
    'full rank': (features(0, 300, 32), features(1, 250, 32, 1.1)),
    'fewer than dimensions': (features(0, 40, 96), features(1, 50, 96, 1.1)),
    'far fewer than dimensions': (features(0, 10, 300), features(1, 20, 300, 1.1)),
    'duplicates': (np.repeat(features(0, 60, 24), 3, 0), np.repeat(features(1, 50, 24), 2, 0)),
    'huge values': (1e6 * features(0, 200, 24), 1e6 * features(1, 200, 24, 1.1)),
    'far from zero': (features(0, 200, 24, offset=1e3), features(1, 200, 24, 1.1, offset=1e3)),
    'tiny sets': (features(0, 7, 5), features(1, 8, 5, 1.1)),
}
