"""Labels of a whole data set where they stand in its records only: read once, then kept in a file."""
import hashlib
import json
import logging
from collections.abc import Callable

import numpy as np

from lit_jax.runtime.kept import keep, load_kept
from lit_jax.runtime.paths import cache_folder
from lit_jax.runtime.read_ahead import read_all

LOG = logging.getLogger('lit_jax')
_BLOCK = 1 << 16      # examples between two lines of the log
_THREADS = 8


def read_labels(identity: dict, count: int, read: Callable[[int], int]) -> np.ndarray:
    """int32 [count]: read(i) of every example, once; what `identity` describes is read from the cache
    afterwards."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / 'labels' / f'{digest[:32]}.npy'
    labels = load_kept(path, np.load)
    if labels is not None and labels.shape == (count,) and labels.dtype == np.int32:
        return labels
    LOG.info('reading the labels of %d examples once, to choose classes; kept in %s', count, path)
    labels = np.empty(count, np.int32)
    for start in range(0, count, _BLOCK):
        block = range(start, min(start + _BLOCK, count))
        labels[block.start:block.stop] = read_all(read, block, _THREADS)
        if block.stop < count:
            LOG.info('%d of %d labels', block.stop, count)
    keep(path, lambda file: np.save(file, labels))
    return labels
