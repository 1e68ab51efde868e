"""What differs between two things is named once, the same way for dicts, dataclasses and numbers."""
import dataclasses

import pytest

from lit_jax.runtime.differences import check_alike, find_differences
from lit_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pair:
    scale: float
    size: tuple


def test_nested_names_and_both_values_are_said():
    a = {'train': {'steps': 3, 'lr': 0.1}, 'latent': Pair(1.0, (2, 3)), 'only': 1}
    b = {'train': {'steps': 4, 'lr': 0.1}, 'latent': {'scale': 2.0, 'size': [2, 3]}, 'x': 'y' * 100}
    assert find_differences(a, b, 'in A', 'in B') == [
        'train.steps: 3 in A, 4 in B', 'latent.scale: 1.0 in A, 2.0 in B', 'only: 1 in A, None in B',
        "x: None in A, '" + 'y' * 37 + '...' + 'y' * 38 + "' in B"]
    assert not find_differences(a, a, 'in A', 'in B')


def test_what_is_not_known_fits_where_it_may():
    assert find_differences({'a': None}, {'a': 1}, '', '') and not find_differences(
        {'a': None}, {'a': 1, 'b': 2}, '', '', none_fits=True)
    assert find_differences({'a': 0}, {'a': 1}, '', '', none_fits=True)


@pytest.mark.parametrize('b, differs', [(1 + 1e-7, False), (1 + 1e-5, True), ('1', True), (1, False)])
def test_numbers_within_the_tolerance_are_equal(b, differs):
    assert bool(find_differences({'a': 1.0}, {'a': b}, '', '', rel_tol=1e-6)) == differs
    assert bool(find_differences({'a': 1.0}, {'a': b}, '', '')) == (b != 1)


def test_many_differences_are_counted():
    a = {str(number): number for number in range(13)}
    wanted = r'(?s)^A and B:\n  0: 0 here, None there\n.*\n  \.\.\. and 3 more\ndo that$'
    with pytest.raises(UserError, match=wanted):
        check_alike(a, {}, 'here', 'there', 'A and B', 'do that')
    check_alike(a, a, 'here', 'there', 'A and B', 'do that')
