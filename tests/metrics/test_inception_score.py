"""The Inception Score against the ADM evaluator, torch-fidelity and closed forms, and the trap of sorted
classes."""
import numpy as np
import pytest
from feature_sets import features, golden, golden_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import import_oracle

from lit_jax.metrics.inception_score import inception_score, sorted_by_class
from lit_jax.runtime.errors import UserError


@pytest.mark.parametrize('name', ['features64', 'features_rank', 'features2048'])
def test_equals_the_adm_evaluator(goldens, name):
    samples, _, arrays, meta = golden(goldens, name)
    for size in meta['case']['splits']:
        score = inception_score(samples, golden_head(meta), split_size=size)[0]
        assert score == pytest.approx(arrays[f'adm_inception_score_{size}'], rel=2e-7)       # float32 there
        assert score == pytest.approx(arrays[f'own_inception_score_{size}_f64'], rel=1e-12)


@pytest.mark.parametrize('name', ['features64', 'features_rank', 'features2048'])
@pytest.mark.parametrize('form, seed', [('shuffled', 2020), ('in_order', None)])
def test_equals_what_torch_fidelity_gave(goldens, name, form, seed):
    samples, _, arrays, meta = golden(goldens, name)
    mean, std = inception_score(samples, golden_head(meta), splits=10, shuffle_seed=seed)
    assert mean == pytest.approx(arrays[f'tfid_isc_{form}_mean'], rel=1e-12)
    assert std == pytest.approx(arrays[f'tfid_isc_{form}_std'], rel=1e-10)


@pytest.mark.peers
@pytest.mark.parametrize('count', [10, 97, 500])
def test_equals_torch_fidelity(count):
    torch, fidelity = import_oracle('torch'), import_oracle('torch_fidelity.metric_isc')
    logits = 9 * features(0, count, 20)
    expected = fidelity.isc_features_to_metric(torch.from_numpy(logits), splits=10)
    score = inception_score(logits, None, splits=10, shuffle_seed=2020)
    assert score == pytest.approx(tuple(expected.values()), rel=1e-12)


def test_equal_probabilities_give_one():
    assert inception_score(features(0, 12, 4), np.ones((4, 3)),
                           split_size=5) == pytest.approx((1.0, 0.0), abs=1e-12)


# at 1e4 the probabilities of other classes are 0, not small
@pytest.mark.parametrize('certainty', [50.0, 1e4])
def test_certain_classes_in_equal_shares_give_their_number(certainty):
    one_hot = certainty * np.eye(8)[np.arange(80) % 8]
    assert inception_score(one_hot, np.eye(8), split_size=40)[0] == pytest.approx(8, rel=1e-12)


def test_sorted_classes_lower_the_score_in_file_order_only():
    labels = np.repeat(np.arange(8), 10)
    one_hot = 50 * np.eye(8)[labels]
    assert inception_score(one_hot, None, split_size=20)[0] == pytest.approx(2)
    assert inception_score(one_hot, None, split_size=20, shuffle_seed=0)[0] > 5
    assert sorted_by_class(labels)


def test_a_short_last_chunk_counts_as_a_full_one():
    logits = features(0, 25, 6)
    parts = [inception_score(logits[i:i + 10], None)[0] for i in (0, 10, 20)]
    mean, std = inception_score(logits, None, split_size=10)
    assert (mean, std) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 60), classes=st.integers(2, 12),
       scale=st.floats(0.1, 30))
def test_lies_between_one_and_the_classes_and_ignores_a_common_shift(seed, count, classes, scale):
    logits = scale * np.random.default_rng(seed).normal(size=(count, classes))
    score = inception_score(logits, None, split_size=7)[0]
    assert 1 - 1e-12 <= score <= classes + 1e-9
    assert inception_score(logits + 100, None, split_size=7)[0] == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize('labels, expected', [
    (np.repeat(np.arange(1000), 50), True),
    (np.tile(np.arange(1000), 50), False),
    (np.random.default_rng(0).integers(0, 1000, 50000), False),
    (np.random.default_rng(0).integers(0, 10, 500), False),
    (np.sort(np.random.default_rng(0).integers(0, 10, 500)), True),
    (np.tile(np.repeat(np.arange(10), 20), 5), True),                   # in runs, again and again
    (np.zeros(100, int), False),                                        # one class: nothing to sort
    (np.repeat([0, 1], [990, 10])[np.random.default_rng(0).permutation(1000)], False),
    (np.arange(1000), False),
    (np.array([], int), False),
])
def test_sorted_labels_are_found(labels, expected):
    assert sorted_by_class(labels) is expected


@pytest.mark.parametrize('pool, kernel, options, text', [
    (np.zeros((4, 3)), np.zeros((2, 5)), {}, r'head_kernel has shape \(2, 5\), expected \[3, classes\]'),
    (np.zeros((4, 3, 2)), None, {}, r'expected \[N, d\]'),
    (np.full((4, 3), np.nan), None, {}, '4 of 4 rows of features are not finite'),
    (np.zeros((4, 3)), None, {'splits': 5}, '4 images cannot be cut into 5 chunks'),
    (np.zeros((4, 3)), None, {'split_size': 0}, 'split_size must be at least 1'),
])
def test_unusable_input_is_refused(pool, kernel, options, text):
    with pytest.raises(UserError, match=text):
        inception_score(pool + np.arange(len(pool)).reshape(-1, *[1] * (pool.ndim - 1)), kernel, **options)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(UserError, match='one class index per image'):
        sorted_by_class(np.zeros((4, 2)))
