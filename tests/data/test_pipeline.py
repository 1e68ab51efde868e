"""The stream of batches: fixed by the seed, the same on every host count, complete, and its threads end."""
import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.data.base import ArraySource, Source, Spec
from lit_jax.data.pipeline import make_pipeline
from lit_jax.runtime.errors import UserError

# Example i is an image full of i + 1 with label i, so that a batch tells which examples it holds.
SPEC = Spec(image_size=2, channels=1, num_classes=1000, class_names=())


def numbered(size: int) -> ArraySource:
    images = np.broadcast_to(np.arange(1, size + 1, dtype=np.float32)[:, None, None, None], (size, 2, 2, 1))
    return ArraySource(SPEC, images, np.arange(size))


class OneByOne(Source):
    """A source without a vectorised `take`, as one that reads files."""

    def __init__(self, size: int, broken: int = -1):
        super().__init__(SPEC)
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError(f'example {index} cannot be read')
        return {'image': np.full((2, 2, 1), index + 1, np.float32), 'label': index}


def add_noise(element, rng):
    return {**element, 'image': element['image'] + rng.random(dtype=np.float32)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture
def data_threads():
    """A function: the reading threads started since the test began. With `ended=True` it waits for them to
    end."""
    before = set(threading.enumerate())

    def new(ended=False):
        deadline = time.monotonic() + (10 if ended else 0)
        while True:
            alive = [t for t in threading.enumerate() if t not in before and t.name.startswith('grain')]
            if not alive or time.monotonic() >= deadline:
                return alive
            time.sleep(0.01)

    return new


@given(size=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 2**63 - 1),
       epochs=st.integers(1, 4))
def test_every_example_comes_once_an_epoch_whether_or_not_the_batch_divides_it(size, batch, seed, epochs):
    pipeline = make_pipeline(numbered(size), global_batch=batch, seed=seed)
    count = -(-epochs * size // batch)
    stream = np.concatenate([pipeline.batch(k)['label'] for k in range(count)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * size:(epoch + 1) * size].tolist()) == list(range(size))


@given(size=st.integers(1, 40), local=st.integers(1, 8), seed=st.integers(0, 100), k=st.integers(0, 1000),
       augmented=st.booleans())
def test_hosts_together_make_the_same_batch_for_every_host_count(size, local, seed, k, augmented):
    options = {'global_batch': 4 * local, 'seed': seed, 'augment': add_noise if augmented else None}
    whole = make_pipeline(numbered(size), **options).batch(k)
    for hosts in (2, 4):
        parts = [make_pipeline(numbered(size), rows=rows, **options).batch(k)
                 for rows in np.split(np.arange(4 * local), hosts)]
        assert_equal({key: np.concatenate([part[key] for part in parts]) for key in whole}, whole)


@settings(max_examples=25)  # each starts threads
@given(size=st.integers(1, 40), batch=st.integers(1, 30), start=st.integers(0, 200),
       threads=st.integers(0, 3))
def test_starting_at_any_step_equals_the_straight_run(size, batch, start, threads):
    straight = make_pipeline(numbered(size), global_batch=batch, seed=5, augment=add_noise)
    resumed = make_pipeline(numbered(size), global_batch=batch, seed=5, augment=add_noise, start_step=start,
                            threads=threads)
    with iter(resumed) as batches:
        for k in range(start, start + 4):
            assert batches.step == k
            assert_equal(next(batches), straight.batch(k))


def test_epochs_and_seeds_differ():
    def order(epoch, seed=0):
        return make_pipeline(numbered(64), global_batch=64, seed=seed).batch(epoch)['label'].tolist()

    orders = [order(0), order(1), order(2), order(0, seed=1), order(1, seed=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(0) == orders[0] != sorted(orders[0])


def test_the_shuffle_is_fair():
    """Over many epochs every example is equally often at every position of the epoch."""
    size, epochs = 6, 3000
    pipeline = make_pipeline(numbered(size), global_batch=size, seed=0)
    orders = np.stack([pipeline.batch(epoch)['label'] for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, position], minlength=size) for position in range(size)])
    # Binomial with mean 500 and deviation 20.4; five deviations for 36 cells under a fixed seed.
    assert np.abs(counts - epochs / size).max() < 103


def test_the_order_has_not_changed():
    """A record: a new order would make a run resumed by a newer version see other data."""
    labels = make_pipeline(numbered(10), global_batch=10, seed=0).batch(0)['label'].tolist()
    assert labels == RECORD


RECORD = [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


def test_augmentation_differs_from_epoch_to_epoch_and_keeps_the_order():
    plain = make_pipeline(numbered(8), global_batch=8, seed=0)
    noisy = make_pipeline(numbered(8), global_batch=8, seed=0, augment=add_noise)
    noise = []
    for k in (0, 1):
        batch = noisy.batch(k)
        np.testing.assert_array_equal(batch['label'], plain.batch(k)['label'])
        noise.append((batch['image'] - plain.batch(k)['image'])[np.argsort(batch['label']), 0, 0, 0])
    assert (noise[0] != noise[1]).all() and len(set(noise[0].tolist())) == 8


@pytest.mark.parametrize('augment',
                         [None, add_noise, lambda e, rng: {'image': e['image'][:, ::-1].astype(np.float64),
                                                           'label': int(e['label'])}])
@pytest.mark.parametrize('source', [numbered(7), OneByOne(7)], ids=['array', 'one by one'])
def test_batches_are_contiguous_arrays_of_the_agreed_types(source, augment):
    batch = make_pipeline(source, global_batch=5, seed=0, augment=augment).batch(3)
    assert set(batch) == {'image', 'label'}
    assert batch['image'].shape == (5, 2, 2, 1) and batch['image'].dtype == np.float32
    assert batch['label'].shape == (5,) and batch['label'].dtype == np.int32
    assert all(array.flags['C_CONTIGUOUS'] and array.flags['WRITEABLE'] for array in batch.values())


def test_a_source_that_reads_one_by_one_gives_the_same_stream():
    for k in (0, 4):
        assert_equal(make_pipeline(OneByOne(11), global_batch=6, seed=2).batch(k),
                     make_pipeline(numbered(11), global_batch=6, seed=2).batch(k))


def test_threads_end_with_the_iterator(data_threads):
    pipeline = make_pipeline(numbered(20), global_batch=4, seed=0, threads=2)
    batches = iter(pipeline)
    next(batches)
    assert data_threads()
    batches.close()
    batches.close()
    assert not data_threads(ended=True)
    with pytest.raises(StopIteration):
        next(batches)


def test_threads_end_with_the_pipeline_and_when_nobody_holds_the_iterator(data_threads):
    pipeline = make_pipeline(numbered(20), global_batch=4, seed=0)
    held = [iter(pipeline), iter(pipeline)]
    for batches in held:
        next(batches)
    assert len(data_threads()) == 2
    pipeline.close()
    assert not data_threads(ended=True)
    dropped = iter(pipeline)
    next(dropped)
    assert data_threads()
    del dropped
    gc.collect()
    assert not data_threads(ended=True)


@pytest.mark.parametrize('threads', [0, 2])
def test_an_unreadable_example_stops_the_stream_with_its_own_error(threads, data_threads):
    batches = iter(make_pipeline(OneByOne(6, broken=3), global_batch=2, seed=0, threads=threads))
    with pytest.raises(OSError, match='example 3 cannot be read'):
        for _ in range(3):
            next(batches)
    # Going on would skip a batch without a word.
    with pytest.raises(StopIteration):
        next(batches)
    assert not data_threads(ended=True)


def test_negative_batches_do_not_exist():
    with pytest.raises(IndexError, match='numbered from 0'):
        make_pipeline(numbered(3), global_batch=1, seed=0).batch(-1)


@pytest.mark.parametrize('options, message', [
    ({'global_batch': 0}, 'batch size must be at least 1, got 0'),
    ({'rows': [3, 4]}, r'must lie in the batch of 4, got \[3 4\]'),
    ({'rows': []}, 'must lie in the batch of 4'),
    ({'seed': -1}, 'seed must be in'),
    ({'start_step': -1}, 'first step must be at least 0'),
    ({'source': OneByOne(0)}, 'source is empty'),
])
def test_bad_requests_are_refused(options, message):
    options = {'source': numbered(4), 'global_batch': 4, 'seed': 0, **options}
    with pytest.raises(UserError, match=message):
        make_pipeline(options.pop('source'), **options)
