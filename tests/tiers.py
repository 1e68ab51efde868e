"""Which cases of a table the quick tier takes: goldens in float64, and in float32 one or two models of a
family. `make test-peers` compares all of them in both, optimized as users' programs are."""
import pytest

BOTH_WIDTHS = pytest.mark.parametrize('wide', [pytest.param(False, marks=pytest.mark.peers), True],
                                      ids=['float32', 'float64'])


def quick(cases, taken):
    """The cases of a parametrization; those that are not `taken` are left to `make test-peers`."""
    return [case if case in taken else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.peers)
            for case in cases]
