"""The stream of training batches from a source, reproducible on any number of hosts.

The seed alone fixes the stream: epoch after epoch, each a new permutation of all examples, at positions p =
0, 1, 2, ... Global batch k has positions k·B to (k+1)·B - 1 and may span two epochs. Augmentation depends on
the position. A host reads the rows of each global batch that its devices need, so the global batch is the
same for every number of hosts and every mesh. With several image shapes each batch has one.

grain reads batches ahead in threads (processes would outlive a killed parent). Shuffle and gather work on
whole batches: grain's own `shuffle`, `map` and `batch` would take as long as a training step of the demo."""
import weakref
from collections.abc import Callable

import grain
import numpy as np

from lit_jax.data.base import Source, random_generator, stack
from lit_jax.data.order import Bucketed, Shuffled
from lit_jax.runtime.errors import UserError

Batch = dict[str, np.ndarray]
Augment = Callable[[dict, np.random.Generator], dict]
_ENDLESS = 2**62  # length, in batches


class Pipeline:
    """Batches {'image': float32 [b, H, W, C], 'label': int32 [b]} of one process; made by `make_pipeline`.

    Sources with captions have other arrays instead of the label, see `Source`."""

    def __init__(self, source: Source, *, global_batch: int, seed: int, start_step: int, rows: np.ndarray,
                 augment: Augment | None, threads: int, prefetch: int):
        self.source, self.global_batch, self.seed, self.start_step = source, global_batch, seed, start_step
        self.rows = rows
        self._augment, self._threads, self._prefetch = augment, threads, prefetch
        self._order = (Shuffled(len(source), seed) if source.bucket_of is None else
                       Bucketed(source.bucket_of, seed, global_batch))
        self._open = weakref.WeakSet()  # an iterator without references closes itself

    def batch(self, k: int) -> Batch:
        """This process's rows of global batch k >= 0, a pure function of (seed, k)."""
        if k < 0:
            raise IndexError(f'batch {k}: batches are numbered from 0')
        positions = k * self.global_batch + self.rows
        indices = self.indices(positions)
        if self._augment is None:
            return self.source.take(indices)
        return stack([self._augment(example, random_generator(self.seed, 'augment', int(p)))
                      for example, p in zip(self.source.each(indices), positions, strict=True)])

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The example at each position of the stream, int64."""
        return self._order(np.asarray(positions, np.int64))

    def __iter__(self) -> 'BatchIterator':
        """Batches start_step, start_step + 1, ... without end, read ahead in the background."""
        iterator = BatchIterator(self, self.start_step, self._threads, self._prefetch)
        self._open.add(iterator)
        return iterator

    def close(self) -> None:
        """Ends the threads of all iterators of this pipeline."""
        for iterator in list(self._open):
            iterator.close()


class BatchIterator:
    """An endless iterator that reads ahead in threads; `step` is the k of the next batch.

    It ends with `close()`, a `with` block, the last reference, or an error of the source."""

    def __init__(self, pipeline: Pipeline, start_step: int, threads: int, prefetch: int):
        dataset = grain.MapDataset.source(_Batches(pipeline))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._iterator.set_state({'next_index': start_step})
        self._finalizer = weakref.finalize(self, self._iterator.close)
        self.step = start_step

    def __iter__(self) -> 'BatchIterator':
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise StopIteration
        batch = None
        try:
            batch = next(self._iterator)
        finally:
            if batch is None:
                self.close()
        self.step += 1
        return batch

    def close(self) -> None:
        """Drops batches read ahead; threads end after their current batch. May be called twice."""
        self._finalizer()

    def __enter__(self) -> 'BatchIterator':
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Batches:
    """The pipeline for grain: a random-access source whose elements are batches."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> Batch:
        return self._pipeline.batch(k)


def make_pipeline(source: Source, *, global_batch: int, seed: int, start_step: int = 0,
                  rows: np.ndarray | None = None, augment: Augment | None = None, threads: int = 1,
                  prefetch: int = 4) -> Pipeline:
    """The batches of one process.

    Args:
        global_batch: examples per step over all processes.
        start_step: k of the iterator's first batch = steps already done.
        rows: positions in the global batch that this process reads (`BatchLayout.rows`); None: all.
        augment: (element, numpy Generator) -> element of the same shapes, before batching. The generator
            depends on (seed, position): the same for every number of hosts, new in every epoch.
        threads: that read ahead; 0: the caller reads. One is enough for data in memory; decoding needs more.
        prefetch: batches held ready, at least `threads`."""
    if len(source) < 1:
        raise UserError('the data source is empty')
    if global_batch < 1:
        raise UserError(f'the batch size must be at least 1, got {global_batch}')
    rows = np.arange(global_batch) if rows is None else np.asarray(rows, np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= global_batch:
        raise UserError(f'the rows of this process must lie in the batch of {global_batch}, got {rows}')
    if not 0 <= seed < 2**63:
        raise UserError(f'the seed must be in [0, 2^63), got {seed}')
    if start_step < 0:
        raise UserError(f'the first step must be at least 0, got {start_step}')
    return Pipeline(source, global_batch=global_batch, seed=seed, start_step=start_step, rows=rows,
                    augment=augment, threads=threads, prefetch=max(prefetch, threads))
