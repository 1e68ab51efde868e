"""The order of examples in the endless stream, as a function of (seed, position) alone.

Shuffled: epoch after epoch, each a new permutation of all examples. Batches may span two epochs.

Bucketed: positions k·B to (k+1)·B - 1 have examples of one bucket, for every k. Each bucket has its own
shuffled stream, from which batches are cut in order; buckets take turns in random order. In epoch e a bucket
with n of the N examples gives floor((e+1)·n/B) - floor(e·n/B) batches, and leaves the rest to the next epoch.
So every example comes once in an epoch of its bucket, and equally often in the long run."""
import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from lit_jax.data.base import random_bits

_KEPT = 3           # permutations per stream: threads that read ahead may be in two epochs at once
_EPOCH_BITS = 40    # of a counter; higher bits are the bucket


class _Permutations:
    """A thread-safe cache of the last used permutations."""

    def __init__(self, make: Callable, kept: int):
        self._make, self._kept = make, kept
        self._orders, self._lock = OrderedDict(), threading.Lock()

    def __call__(self, *key: int) -> np.ndarray:
        with self._lock:
            if key not in self._orders:
                self._orders[key] = self._make(*key)
                while len(self._orders) > self._kept:
                    self._orders.popitem(last=False)
            self._orders.move_to_end(key)
            return self._orders[key]


def permutation(seed: int, stream: str, counter: int, count: int) -> np.ndarray:
    """A random permutation, int64, by sorting raw words: numpy keeps these the same in all versions."""
    return np.argsort(random_bits(seed, stream, counter).random_raw(count), kind='stable')


class Shuffled:
    """Maps positions int64 [n] to examples int64 [n]; each of `count` examples once per epoch."""

    def __init__(self, count: int, seed: int, stream: str = 'shuffle', first_counter: int = 0):
        self._count = count
        self._order = _Permutations(lambda epoch: permutation(seed, stream, first_counter + epoch, count),
                                    _KEPT)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(positions, self._count)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._order(epoch)[offsets[here]]
        return indices


class Bucketed:
    """The same with one bucket per batch. bucket_of: bucket of each example, int [len]; batch: B."""

    def __init__(self, bucket_of: np.ndarray, seed: int, batch: int):
        numbers, inverse, counts = np.unique(bucket_of, return_inverse=True, return_counts=True)
        self._batch, self._counts, self._seed = batch, counts.astype(np.int64), seed
        members = np.split(np.argsort(inverse, kind='stable'), np.cumsum(counts)[:-1])
        # Counters use the bucket's number in the table, not its rank among the non-empty ones.
        self._streams = [(own, Shuffled(len(own), seed, 'shuffle in a bucket', int(number) << _EPOCH_BITS))
                         for number, own in zip(numbers, members, strict=True)]
        self._slots = _Permutations(self._epoch_slots, _KEPT)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        batches, rows = np.divmod(positions, self._batch)
        indices = np.empty_like(positions)
        for k in np.unique(batches).tolist():
            here = batches == k
            stream, number = self._place(k)
            own, order = self._streams[stream]
            indices[here] = own[order(number * self._batch + rows[here])]
        return indices

    def _begin(self, epoch: int) -> np.ndarray:
        """Batches of each bucket before an epoch, int64 [buckets]."""
        return epoch * self._counts // self._batch

    def _place(self, k: int) -> tuple[int, int]:
        """Global batch k as (stream, batch of that stream)."""
        # Before epoch e there are at most e·N/B batches, and fewer by less than one per bucket.
        last = (k + len(self._counts) + 1) * self._batch // int(self._counts.sum()) + 1
        epoch = bisect.bisect_right(range(last + 1), k, key=lambda e: int(self._begin(e).sum())) - 1
        begin = self._begin(epoch)
        stream, rank = self._slots(epoch)[k - int(begin.sum())].tolist()
        return stream, int(begin[stream]) + rank

    def _epoch_slots(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, int64 [batches, 2]: stream, and rank among its batches of the epoch."""
        counts = self._begin(epoch + 1) - self._begin(epoch)
        streams = np.repeat(np.arange(len(counts)), counts)
        ranks = np.arange(len(streams)) - np.repeat(np.cumsum(counts) - counts, counts)
        streams = streams[permutation(self._seed, 'order of buckets', epoch, len(streams))]
        slots = np.empty((len(streams), 2), np.int64)
        by_stream = np.argsort(streams, kind='stable')
        slots[by_stream] = np.stack([streams[by_stream], ranks], axis=1)
        return slots
