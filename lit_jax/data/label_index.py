"""Labels of a data set that has them only in its records: read once, then cached."""
import json
import logging
from collections.abc import Callable

import numpy as np

from lit_jax.runtime.kept import keep_facts
from lit_jax.runtime.read_ahead import read_all

LOG = logging.getLogger('lit_jax')
_BLOCK = 1 << 16      # examples between two log lines
_THREADS = 8


def read_labels(identity: dict, count: int, read: Callable[[int], int]) -> np.ndarray:
    """int32 [count]: read(i) of every example, cached for the data set that `identity` describes."""
    def make(path) -> np.ndarray:
        LOG.info('reading the labels of %d examples once, to choose classes; kept in %s', count, path)
        labels = np.empty(count, np.int32)
        for start in range(0, count, _BLOCK):
            block = range(start, min(start + _BLOCK, count))
            labels[block.start:block.stop] = read_all(read, block, _THREADS)
            if block.stop < count:
                LOG.info('%d of %d labels', block.stop, count)
        return labels

    return keep_facts('labels', json.dumps(identity, sort_keys=True), '.npy', make=make, load=np.load,
                      save=np.save, fits=lambda labels: (labels.shape, labels.dtype) == ((count,), np.int32))
