"""Aspect-ratio buckets: the table, which image goes where, the crop, and streams whose batches hold one shape
each."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import noise

from lit_jax.data.base import Source, Spec
from lit_jax.data.buckets import bucket_of, bucket_table, check_sides
from lit_jax.data.crop import center_crop, cover_crop
from lit_jax.data.pipeline import make_pipeline
from lit_jax.runtime.errors import UserError

# ------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize('base, step', [(256, 16), (512, 32), (1024, 64), (2048, 128)])
def test_the_usual_sizes_have_the_shapes_of_one_table(base, step):
    table = bucket_table(base)
    assert len(table) == 33 and table[0] == (base // 2, 2 * base) and table[-1] == (2 * base, base // 2)
    assert [(h // step, w // step) for h, w in table] == [(h // 32, w // 32) for h, w in bucket_table(512)]
    assert max(abs(h * w / base**2 - 1) for h, w in table) < 0.055


@given(units=st.integers(1, 80), multiple=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_every_table_keeps_its_promises(units, multiple):
    base = units * multiple
    table = bucket_table(base, multiple)
    assert (base, base) in table and len(set(table)) == len(table)
    assert all((w, h) in table and h % multiple == w % multiple == 0 and max(h, w) <= 4 * min(h, w)
               for h, w in table)
    ratios = [h / w for h, w in table]
    assert ratios == sorted(ratios)
    step = next(s for s in range(max(multiple, base // 16 // multiple * multiple), 0, -multiple)
                if base % s == 0 or s == multiple)
    # Half a step of the longer side is what rounding may cost.
    assert all(abs(h * w - base**2) <= step / 2 * max(h, w) for h, w in table)


@pytest.mark.parametrize('size, near', [(500, '496 and 512'), (513, '512 and 528'), (7, 'the nearest: 16'),
                                        (0, 'nearest: 16')])
def test_sides_that_do_not_fit_are_refused_with_the_nearest(size, near):
    with pytest.raises(UserError, match=f'image_size={size} does not fit.*multiples of 16.*{near}'):
        bucket_table(size)
    check_sides(512, 16)


def test_images_go_to_the_nearest_ratio():
    table = bucket_table(512)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5000, (2000, 2))
    got = bucket_of(sizes, table)
    assert got.dtype == np.int32 and got.shape == (2000,)
    distance = np.abs(np.log(sizes[:, 1] / sizes[:, 0])[:, None] - np.log([h / w for h, w in table])[None])
    np.testing.assert_allclose(distance[np.arange(2000), got], distance.min(axis=1), atol=1e-12)
    wide, tall, square = bucket_of(np.array([[9999, 10], [10, 9999], [77, 77]]), table)
    assert (table[wide], table[tall], table[square]) == ((256, 1024), (1024, 256), (512, 512))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), rows=st.integers(1, 30),
       columns=st.integers(1, 30))
def test_the_crop_has_its_shape_and_shows_the_middle(width, height, rows, columns):
    assert cover_crop(noise(width, height), (rows, columns)).shape == (rows, columns, 3)


def test_the_crop_cuts_as_little_as_it_can():
    """Left half black, right half white: of an image twice as wide as it should be the middle half is
    left."""
    from PIL import Image
    image = np.zeros((40, 160, 3), np.uint8)
    image[:, 60:100] = 128
    image[:, 100:] = 255
    out = cover_crop(Image.fromarray(image), (20, 40))
    assert out[:, 0].max() == 0 and out[:, -1].min() == 255
    np.testing.assert_array_equal(out[10, 12:28], 128)
    np.testing.assert_array_equal(cover_crop(noise(70, 50), (16, 16)), center_crop(noise(70, 50), 16))
    # An image of the shape stays as it is.
    np.testing.assert_array_equal(cover_crop(noise(30, 20), (20, 30)), np.asarray(noise(30, 20)))


# ------------------------------------------------------------------------------------------------------
# Streams


class InBuckets(Source):
    """Example i is full of i and has the shape of its bucket: (1, 1 + bucket)."""

    def __init__(self, bucket_of):
        super().__init__(Spec(1, 1, 0, ()))
        self.bucket_of = np.asarray(bucket_of, np.int32)
        self.buckets = tuple((1, 1 + b) for b in range(int(self.bucket_of.max()) + 1))

    def __len__(self):
        return len(self.bucket_of)

    def __getitem__(self, index):
        return {'image': np.full((*self.buckets[self.bucket_of[index]], 1), index, np.float32)}


def add_noise(element, rng):
    return {'image': element['image'] + rng.random(dtype=np.float32) / 2}


def stream(buckets, *, batch, seed=0, count, **options):
    pipeline = make_pipeline(InBuckets(buckets), global_batch=batch, seed=seed, **options)
    return [pipeline.batch(k)['image'] for k in range(count)]


some_buckets = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(buckets=some_buckets, batch=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
def test_every_example_comes_once_an_epoch_of_its_bucket_and_batches_hold_one_shape(buckets, batch, seed):
    batches = stream(buckets, batch=batch, seed=seed, count=3 * len(buckets) // batch + 12)
    assert all(b.shape[0] == batch for b in batches)  # a batch of two shapes could not be stacked
    buckets = np.array(buckets)
    for bucket in set(buckets.tolist()):
        members = np.flatnonzero(buckets == bucket).tolist()
        parts = [b[:, 0, 0, 0] for b in batches if b.shape[2] == 1 + bucket]
        seen = np.concatenate([[], *parts]).astype(int).tolist()
        for start in range(0, len(seen) // len(members) * len(members), len(members)):
            assert sorted(seen[start:start + len(members)]) == members
        rest = seen[len(seen) // len(members) * len(members):]
        assert len(set(rest)) == len(rest)


@given(buckets=some_buckets, batch=st.integers(1, 12), epochs=st.integers(1, 30))
def test_after_each_epoch_every_bucket_has_had_its_share(buckets, batch, epochs):
    """Less than a batch of each bucket is left to the next epoch, never more, and nothing is given twice."""
    counts = np.bincount(buckets, minlength=5)
    total = int((epochs * counts // batch).sum())
    made = [b.shape[2] - 1 for b in stream(buckets, batch=batch, count=total)]
    np.testing.assert_array_equal(np.bincount(made, minlength=5) if made else np.zeros(5),
                                  epochs * counts // batch)


@settings(max_examples=30)
@given(buckets=some_buckets, local=st.integers(1, 4), k=st.integers(0, 10**6))
def test_hosts_together_make_the_same_batch_of_one_shape(buckets, local, k):
    options = {'global_batch': 4 * local, 'seed': 3, 'augment': add_noise}
    whole = make_pipeline(InBuckets(buckets), **options).batch(k)['image']
    for hosts in (2, 4):
        parts = [make_pipeline(InBuckets(buckets), rows=rows, **options).batch(k)['image']
                 for rows in np.split(np.arange(4 * local), hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@settings(max_examples=20)  # each starts threads
@given(buckets=some_buckets, batch=st.integers(1, 8), start=st.integers(0, 300), threads=st.integers(0, 3))
def test_starting_at_any_step_equals_the_straight_run(buckets, batch, start, threads):
    straight = make_pipeline(InBuckets(buckets), global_batch=batch, seed=5, augment=add_noise)
    resumed = make_pipeline(InBuckets(buckets), global_batch=batch, seed=5, augment=add_noise,
                            start_step=start, threads=threads)
    with iter(resumed) as batches:
        for k in range(start, start + 4):
            np.testing.assert_array_equal(next(batches)['image'], straight.batch(k)['image'])


def test_batches_come_in_another_order_in_each_epoch_and_of_each_seed():
    buckets = [0] * 40 + [1] * 40

    def shapes(epoch, seed=0):
        made = stream(buckets, batch=2, seed=seed, count=40 * (epoch + 1))
        return [b.shape[2] for b in made[40 * epoch:]]

    orders = [shapes(0), shapes(1), shapes(0, seed=1)]
    assert all(sorted(order) == [1] * 20 + [2] * 20 for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != sorted(orders[0])


def test_all_examples_come_equally_often_in_the_long_run():
    """A bucket of one example and one of eleven: in 120 batches of four each example comes 40 times."""
    seen = np.concatenate([b[:, 0, 0, 0] for b in stream([0] + [1] * 11, batch=4, count=120)]).astype(int)
    np.testing.assert_array_equal(np.bincount(seen), [40] * 12)


def test_the_order_has_not_changed():
    """A record: a new order would make a run resumed by a newer version see other data."""
    made = stream([0, 1, 0, 1, 1, 0, 1], batch=2, count=4)
    assert [b[:, 0, 0, 0].astype(int).tolist() for b in made] == RECORD


RECORD = [[3, 6], [4, 1], [2, 5], [0, 0]]
