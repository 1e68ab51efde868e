"""Labels of a whole data set where they stand in its records only: read once, then kept in a file."""
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lit_jax.paths import cache_folder

LOG = logging.getLogger('lit_jax')
_BLOCK = 1 << 16      # examples between two lines of the log
_THREADS = 8


def read_labels(identity: dict, count: int, read: Callable[[int], int]) -> np.ndarray:
    """int32 [count]: read(i) of every example, once; what `identity` describes is read from the cache afterwards."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / 'labels' / f'{digest[:32]}.npy'
    if path.exists():
        try:
            labels = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            LOG.warning('%s cannot be read (%s); the labels are read again', path, error)
        else:
            if labels.shape == (count,) and labels.dtype == np.int32:
                return labels
    LOG.info('reading the labels of %d examples once, to choose classes; kept in %s', count, path)
    labels = np.empty(count, np.int32)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, count, _BLOCK):
            block = range(start, min(start + _BLOCK, count))
            labels[block.start:block.stop] = list(pool.map(read, block))
            if block.stop < count:
                LOG.info('%d of %d labels', block.stop, count)
    _keep(path, labels)
    return labels


def _keep(path: Path, labels: np.ndarray) -> None:
    """Written beside its name and renamed; without room or permission the labels are read again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, labels)
        os.replace(file.name, path)
    except OSError as error:
        LOG.warning('the labels cannot be kept in %s: %s', path, error)
