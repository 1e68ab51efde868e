"""The kernel distance against torch-fidelity, clean-fid and its definition."""
import numpy as np
import pytest
from feature_sets import GOLDEN, HARD, features, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import import_oracle

from lit_jax.metrics.kernel import kernel_distance
from lit_jax.runtime.errors import UserError


@pytest.mark.parametrize('name', GOLDEN)
def test_equals_what_torch_fidelity_gave(goldens, name):
    samples, reference, arrays, meta = golden(goldens, name)
    for subsets, size in meta['case']['kid']:
        mean, std = kernel_distance(samples, reference, subsets=subsets, subset_size=size)
        # torch-fidelity in float64, and as it comes
        for kind, tolerance in (('kid64', 1e-9), ('kid', 1e-6)):
            assert mean == pytest.approx(arrays[f'tfid_{kind}_{subsets}x{size}_mean'], rel=0, abs=tolerance)
            assert std == pytest.approx(arrays[f'tfid_{kind}_{subsets}x{size}_std'], rel=0, abs=tolerance)
        assert mean == pytest.approx(arrays[f'tfid_kid64_{subsets}x{size}_mean'], rel=1e-9)


@pytest.mark.peers
@pytest.mark.parametrize('name', HARD)
def test_equals_torch_fidelity_and_clean_fid(name):
    torch, fidelity = import_oracle('torch'), import_oracle('torch_fidelity.metric_kid')
    clean = import_oracle('cleanfid.fid')
    samples, reference = HARD[name]
    size = min(len(samples), len(reference))
    expected = fidelity.kid_features_to_metric(*(torch.from_numpy(x.astype(np.float64))
                                                 for x in (samples, reference)),
                                               kid_subsets=7, kid_subset_size=size // 2, verbose=False)
    found = kernel_distance(samples, reference, subsets=7, subset_size=size // 2)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-6)
    # clean-fid draws in another order: one subset of everything has no order.
    x, y = samples[:size].astype(np.float64), reference[:size].astype(np.float64)
    expected = clean.kernel_distance(x, y, num_subsets=1, max_subset_size=size)
    assert kernel_distance(x, y, subsets=1, subset_size=size)[0] == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 12), dims=st.integers(1, 9))
def test_equals_its_definition_and_does_not_tell_the_sets_apart(seed, count, dims):
    x, y = features(seed, count, dims).astype(float), features(seed + 1, count, dims, 1.5).astype(float)

    def k(a, b):
        return (a @ b / dims + 1) ** 3

    others = [(i, j) for i in range(count) for j in range(count) if i != j]
    expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in others) / len(others)
                - 2 * sum(k(a, b) for a in x for b in y) / count ** 2)
    scale = k(x[0], x[0]) + k(y[0], y[0]) + 1
    found = kernel_distance(x, y, subsets=1, subset_size=count)[0]
    assert found == pytest.approx(expected, abs=1e-10 * scale)
    assert found == pytest.approx(kernel_distance(y, x, subsets=1, subset_size=count)[0], abs=1e-10 * scale)


def test_sets_of_one_law_are_at_zero_on_average():
    """Unbiased: with the diagonal left in, the mean would be 0.1 and not 0.00."""
    mean, std = kernel_distance(features(0, 2000, 16), features(1, 2000, 16), subset_size=200)
    assert abs(mean) < 4 * std / 10


def test_the_seed_decides():
    sets = features(0, 90, 8), features(1, 80, 8)
    first, again, other = (kernel_distance(*sets, subsets=3, subset_size=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize('options, text', [
    ({}, 'subsets of 1000 do not fit 30 samples and 20 reference rows; .*subset_size=20'),
    ({'subset_size': 1}, 'at least 1 of at least 2'),
    ({'subset_size': 10, 'subsets': 0}, 'at least 1 of at least 2'),
])
def test_impossible_subsets_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        kernel_distance(features(0, 30, 4), features(1, 20, 4), **options)


@pytest.mark.parametrize('samples, reference, text', [
    (features(0, 30, 4), features(0, 30, 5), 'samples have 4 dimensions and the reference 5'),
    (features(0, 30, 4), np.zeros((30, 2, 2)), r'reference have shape \(30, 2, 2\)'),
    (features(0, 30, 4) + np.inf, features(0, 30, 4), '30 of 30 rows of samples are not finite'),
])
def test_unusable_features_are_refused(samples, reference, text):
    with pytest.raises(UserError, match=text):
        kernel_distance(samples, reference, subset_size=10)
