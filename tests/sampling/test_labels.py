"""Which class each image of a set shows."""
import numpy as np
import pytest

from lit_jax.runtime.errors import UserError
from lit_jax.sampling.labels import choose_labels, parse_classes
from lit_jax.sampling.noise import random_labels


def test_classes_default_to_the_first_ten_of_a_grid_and_all_of_a_set():
    assert parse_classes('', 1000) == list(range(10))
    assert parse_classes('', 3) == [0, 1, 2]
    assert parse_classes('', 1000, most=None) == list(range(1000))
    assert parse_classes('7, 3', 10) == [7, 3]


@pytest.mark.parametrize('text, message', [('10', r'class 10 is out of range; this model knows 0\.\.9'),
                                           ('-1,3', 'class -1'), ('cat', 'not a list of class'),
                                           ('1,,2', 'not a list')])
def test_wrong_classes_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_classes(text, 10)


def test_random_labels_depend_on_seed_and_number_only():
    all_of_them = random_labels(5, 4000, range(10))
    np.testing.assert_array_equal(random_labels(5, 100, range(10)), all_of_them[:100])
    assert (random_labels(6, 4000, range(10)) != all_of_them).mean() > 0.8
    counts = np.bincount(all_of_them)
    assert len(counts) == 10 and abs(counts - 400).max() < 5 * np.sqrt(400)
    assert set(random_labels(5, 100, [3, 7])) == {3, 7}


def test_balanced_labels_come_in_turns():
    np.testing.assert_array_equal(choose_labels('balanced', [3, 7, 1], seed=0, per_class=2),
                                  [3, 7, 1, 3, 7, 1])
    np.testing.assert_array_equal(choose_labels('balanced', [3, 7], seed=0, count=4), [3, 7, 3, 7])


@pytest.mark.parametrize('policy, given, message', [
    ('sorted', {'count': 3}, 'known: random, balanced'), ('random', {}, 'neither'),
    ('random', {'count': 3, 'per_class': 1}, 'both'),
    ('random', {'per_class': 3}, 'random labels take --count'),
    ('random', {'count': 0}, '--count must be at least 1'),
    ('balanced', {'per_class': -1}, '--per_class must be at least 1'),
    ('random', {'count': 1 << 40}, 'at most'), ('balanced', {'count': 10}, 'take --count 9')])
def test_numbers_that_cannot_be_met_are_refused(policy, given, message):
    with pytest.raises(UserError, match=message):
        choose_labels(policy, [0, 1, 2], seed=0, **given)
