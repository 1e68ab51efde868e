"""The judge of digits: learns real ones, tells bad samples from good ones, saves and loads whole."""
import numpy as np
import pytest
from sklearn.datasets import load_digits

from lit_jax.data.toys.mnist import open_mnist
from lit_jax.metrics.toys.digits_judge import FEATURES, Judge, load_judge, open_mnist_judge, train_judge
from lit_jax.runtime.errors import UserError


@pytest.fixture(scope='module')
def split():
    """(train images, train labels, held-out images, held-out labels) of the real digits."""
    digits = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    held_out, train = order[:360], order[360:]
    return images[train], digits.target[train], images[held_out], digits.target[held_out]


@pytest.fixture(scope='module')
def judge(split) -> Judge:
    """A short training; the demo's is several times longer."""
    return train_judge(*split[:2], seed=0, steps=150)


def test_knows_held_out_digits(judge, split):
    # 0.95 of 360: this short training reaches 0.97 to 0.98, the full one 0.99.
    assert judge.accuracy(*split[2:]) >= 0.95


def test_the_features_of_the_training_split_have_variance_one_on_average(judge, split):
    features = judge.features(split[0])
    assert features.shape == (len(split[0]), FEATURES) and features.dtype == np.float32
    np.testing.assert_allclose(features, judge.reference, rtol=1e-5, atol=1e-5)
    assert features.var(axis=0, ddof=1).mean() == pytest.approx(1, rel=1e-4)  # float32 features


def test_distance_orders_images_by_how_real_they_are(judge, split):
    train, train_labels, held_out, _ = split
    rng = np.random.default_rng(0)
    floor = judge.distance(held_out)
    noisy = judge.distance(held_out + 0.5 * rng.normal(size=held_out.shape))
    one_class_missing = judge.distance(train[train_labels != 3])
    nonsense = judge.distance(rng.uniform(-1, 1, held_out.shape))
    assert judge.distance(train) < 1e-3 < floor < noisy < nonsense
    assert one_class_missing > floor


def test_accuracy_counts_the_labels_that_agree(judge, split):
    seen = judge.predict(split[2])
    assert seen.dtype == np.int32
    assert judge.accuracy(split[2], seen) == 1.0
    assert judge.accuracy(split[2], (seen + 1) % 10) == 0.0


def test_images_are_judged_one_by_one(judge, split):
    """More images than one call takes: the same features whatever stands beside an image."""
    whole = judge.features(split[0][:1001])
    # float32 products
    np.testing.assert_allclose(whole[990:], judge.features(split[0][990:1001]), rtol=1e-4, atol=1e-5)


def test_same_seed_same_judge_other_seed_another(split):
    first, again, other = (train_judge(*split[:2], seed=seed, steps=3).features(split[2])
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_saved_and_loaded_it_judges_the_same(judge, split, tmp_path):
    judge.save(tmp_path / 'judge.npz')
    loaded = load_judge(tmp_path / 'judge.npz')
    np.testing.assert_array_equal(loaded.features(split[2]), judge.features(split[2]))
    assert loaded.distance(split[2]) == judge.distance(split[2])


def test_a_damaged_or_foreign_file_is_refused(judge, tmp_path):
    path = tmp_path / 'judge.npz'
    with pytest.raises(UserError, match='not a saved judge'):
        load_judge(path)
    judge.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='delete it'):
        load_judge(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(UserError, match='not a saved judge'):
        load_judge(path)
    np.savez(path, something=np.array([{}], dtype=object))  # unpickling it would run code: it must be refused
    with pytest.raises(UserError, match='not a saved judge'):
        load_judge(path)


def test_wrong_shapes_and_labels_are_refused(judge, split):
    with pytest.raises(UserError, match='\\[N, 8, 8, 1\\]'):
        judge.features(np.zeros((3, 8, 8)))
    with pytest.raises(UserError, match='class indices 0..9'):
        train_judge(split[0], split[1] + 1)
    with pytest.raises(UserError, match='class indices 0..9'):
        train_judge(split[0], split[1][:-1])


@pytest.mark.slow
def test_the_judge_of_mnist_ships_and_knows_held_out_digits():
    judge, held_out = open_mnist_judge(), open_mnist('held_out')
    assert judge.image == (28, 28, 1) and judge.reference.shape == (8_000, FEATURES)
    assert judge.accuracy(held_out.images, held_out.labels) >= 0.99
    assert judge.distance(held_out.images) < 0.1 and abs(judge.kernel_distance(held_out.images)) < 0.02


def test_a_judge_may_be_saved_without_its_reference(judge, split, tmp_path):
    judge.save(tmp_path / 'judge.npz', reference=False)
    with pytest.raises(UserError, match='not a saved judge'):
        load_judge(tmp_path / 'judge.npz')
    np.testing.assert_array_equal(load_judge(tmp_path / 'judge.npz', split[0]).reference, judge.reference)


def test_a_judge_takes_the_size_of_its_training_images():
    images = np.random.default_rng(0).uniform(-1, 1, (4, 12, 12, 1))
    judge = train_judge(images, np.arange(4), steps=1)
    assert judge.image == (12, 12, 1)
    with pytest.raises(UserError, match='\\[N, 12, 12, 1\\]'):
        judge.features(np.zeros((3, 8, 8, 1)))
