"""Which class each image of a set shows."""
import numpy as np
import pytest

from lit_jax.runtime.errors import UserError
from lit_jax.sampling.labels import choose_labels, class_names, find_classes, parse_classes, spread_labels
from lit_jax.sampling.noise import random_labels


def numbered(count):
    return class_names({}, range(count))


def test_classes_default_to_the_first_ten_of_a_grid_and_all_of_a_set():
    assert parse_classes('', numbered(1000)) == list(range(10))
    assert parse_classes('', numbered(3)) == [0, 1, 2]
    assert parse_classes('', numbered(1000), most=None) == list(range(1000))
    assert parse_classes('7, 3', numbered(10)) == [7, 3]


@pytest.mark.parametrize('text, message', [('10', r'class 10 is out of range; this model knows 0\.\.9'),
                                           ('-1,3', 'class -1'), ('cat', "'cat'; .* by numbers only: 0..9"),
                                           ('1,,2', "unknown class ''")])
def test_wrong_classes_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_classes(text, numbered(10))


NAMES = ['circle', 'Black Square', 'tench, Tinca tinca', 'tench', '2', '']


@pytest.mark.parametrize('text, numbers', [
    ('circle', [0]), ('CIRCLE, black_square,0', [0, 1, 0]), ('tench,Tinca tinca,tench', [2, 3]),
    ('tench,tench, tinca tinca', [3, 2]), ('5', [5]), ('class 5', [5])])
def test_classes_by_name_also_with_commas_in_it(text, numbers):
    assert parse_classes(text, class_names({'classes': NAMES}, range(6))) == numbers


def test_near_names_and_names_that_are_numbers(caplog):
    with pytest.raises(UserError, match=r"'circel' \(did you mean circle\?\); .* 0\.\.5: circle,"):
        parse_classes('circle,circel', NAMES)
    assert find_classes([np.int64(2), 'circle'], NAMES) == [2, 0]
    assert caplog.messages == ["class 2, counted from 0, is 'tench, Tinca tinca'; that of the name 2 has the "
                               'number 4']


def test_samples_of_a_run_spread_over_the_classes():
    assert spread_labels(4, 2) == [0, 0, 1, 1] and spread_labels(3, 1000) == [0, 333, 666]


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
