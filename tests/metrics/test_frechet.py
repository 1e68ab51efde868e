"""The Fréchet distance against closed forms and other packages, its symmetries, and what it does with too few
samples."""
import numpy as np
import pytest
from feature_sets import HARD, features, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import import_oracle

from lit_jax.metrics.frechet import RunningStatistics, Statistics, frechet_distance, statistics
from lit_jax.runtime.errors import UserError


def random_features(seed, count=200, dims=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims)


def test_statistics_are_the_mean_and_the_unbiased_covariance_in_float64():
    features = random_features(0).astype(np.float32)
    mean, cov, count = statistics(features)
    assert count == len(features)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


def test_float32_features_far_from_zero_keep_their_covariance():
    # A float32 sum of squares around 1e4 would lose a variance of 1e-2 altogether.
    features = (1e4 + 0.1 * np.random.default_rng(0).normal(size=(5000, 2))).astype(np.float32)
    # 0.1: five sigma of a variance of 5000 draws
    assert statistics(features).cov[0, 0] == pytest.approx(1e-2, rel=0.1)


def test_one_dimension_equals_the_closed_form():
    a = Statistics(np.array([1.0]), np.array([[4.0]]))
    b = Statistics(np.array([4.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx((4 - 1) ** 2 + (3 - 2) ** 2, rel=1e-12)


def test_commuting_covariances_equal_the_closed_form():
    """Covariances with the same eigenvectors: d² = Σ (√λ - √μ)²; the 1e-6 floor of FID codes would show
    here."""
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = np.array([1e-8, 1e-4, 1.0, 2.0, 50.0]), np.array([4e-8, 0.0, 3.0, 2.0, 20.0])
    a, b = (Statistics(np.zeros(5), (vectors * values) @ vectors.T) for values in (first, second))
    expected = np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)  # roots of 1e-8 next to 50 in float64


def test_general_covariances_equal_the_root_of_the_product():
    """tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁Σ₂: not symmetric, but fine at full
    rank."""
    a, b = statistics(random_features(2)), statistics(random_features(3))
    roots = np.sqrt(np.linalg.eigvals(a.cov @ b.cov).real).sum()
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 40), dims=st.integers(1, 24))
def test_symmetric_never_negative_and_zero_for_equal_sets(seed, count, dims):
    """Also with fewer samples than dimensions, where both covariances are singular."""
    first, second = random_features(seed, count, dims), random_features(seed + 1, count + 3, dims)
    a, b = statistics(first), statistics(second)
    scale = np.trace(a.cov) + np.trace(b.cov)
    distance = frechet_distance(a, b)
    # A zero eigenvalue comes back as rounding of 1e-16 · scale² whose root is 1e-8 · scale, `dims` times.
    tolerance = 1e-7 * dims * scale
    assert distance >= 0
    assert distance == pytest.approx(frechet_distance(b, a), abs=tolerance, rel=1e-9)
    assert frechet_distance(a, a) <= tolerance


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_rotation_changes_nothing_and_a_shift_adds_its_square(seed):
    rng = np.random.default_rng(seed)
    first, second = random_features(seed), random_features(seed + 1)
    rotation, shift = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=6)
    plain = frechet_distance(statistics(first), statistics(second))
    assert frechet_distance(statistics(first @ rotation),
                            statistics(second @ rotation)) == pytest.approx(plain, rel=1e-8)
    moved = frechet_distance(statistics(first), statistics(first + shift))
    assert moved == pytest.approx(np.square(shift).sum(), rel=1e-6, abs=1e-6)


def test_more_samples_come_closer():
    """The bias of few samples falls with their number: 20 samples of 32 dimensions against 2000 of the same
    law."""
    reference = statistics(np.random.default_rng(0).normal(size=(20000, 32)))
    few, many = (frechet_distance(statistics(np.random.default_rng(1).normal(size=(n, 32))), reference)
                 for n in (20, 2000))
    assert 0 < many < few / 10


@pytest.mark.parametrize('features, text', [
    (np.zeros((1, 4)), 'at least 2 rows'),
    (np.zeros((4, 2, 2)), 'expected \\[N, d\\]'),
    (np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, np.inf]]), '2 of 3 rows of features are not finite \\(first: '
                                                           'row 1\\)'),
])
def test_unusable_features_are_refused(features, text):
    with pytest.raises(UserError, match=text):
        statistics(features)


def test_different_dimensions_are_refused():
    with pytest.raises(UserError, match='6 and 3 dimensions'):
        frechet_distance(statistics(random_features(0)), statistics(random_features(0, dims=3)))


@pytest.mark.parametrize('name', ['features64', 'features_rank'])
def test_equals_the_adm_evaluator(goldens, name):
    samples, reference, arrays, _ = golden(goldens, name)
    adm = statistics(reference, float32_mean=True)
    np.testing.assert_array_equal(adm.mean, arrays['ref_mu_real'])
    np.testing.assert_allclose(adm.cov, arrays['ref_sigma_real'], rtol=0, atol=1e-14)
    for float32_mean in (False, True):
        distance = frechet_distance(statistics(samples, float32_mean), statistics(reference, float32_mean))
        assert distance == pytest.approx(arrays['adm_fid'], rel=5e-7)
        assert distance == pytest.approx(arrays['tfid_fid'], rel=5e-7)


@pytest.mark.peers
@pytest.mark.parametrize('name', HARD)
def test_equals_torch_fidelity_and_clean_fid(name):
    torch, fidelity = import_oracle('torch'), import_oracle('torch_fidelity.metric_fid')
    clean = import_oracle('cleanfid.fid')
    samples, reference = HARD[name]
    a, b = statistics(samples), statistics(reference)
    theirs = [fidelity.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64)))
              for x in (samples, reference)]
    expected = fidelity.fid_statistics_to_metric(*theirs, verbose=False)['frechet_inception_distance']
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(clean.frechet_distance(a.mean, a.cov, b.mean, b.cov),
                                                   rel=1e-6)


@pytest.mark.parametrize('name', HARD)
def test_equals_the_form_without_covariances(name):
    """The last trace is the nuclear norm of X₁X₂ᵀ for centred features X over √(N - 1): no rank is lost on
    the way."""
    samples, reference = HARD[name]
    first, second = ((x.astype(np.float64) - x.mean(0, dtype=np.float64)) / np.sqrt(len(x) - 1)
                     for x in (samples, reference))
    shift = np.square(samples.mean(0, dtype=np.float64) - reference.mean(0, dtype=np.float64)).sum()
    expected = shift + np.square(first).sum() + np.square(second).sum() - 2 * np.linalg.norm(
        first @ second.T, 'nuc')
    assert frechet_distance(statistics(samples), statistics(reference)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('name', HARD)
def test_of_a_set_with_itself_is_zero(name):
    stats = statistics(HARD[name][0])
    assert frechet_distance(stats, stats) <= 1e-12 * np.trace(stats.cov)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 299), max_size=6),
       hosts=st.integers(1, 4), offset=st.sampled_from([0.0, 1e3]))
def test_statistics_of_parts_equal_those_of_the_whole(seed, cuts, hosts, offset):
    whole = features(seed, 300, 12, offset=offset)
    running = [RunningStatistics() for _ in range(hosts)]
    for number, part in enumerate(np.split(whole, sorted(set(cuts)))):
        running[number % hosts].add(part)
    for other in running[1:]:
        running[0].merge(other)
    result, expected = running[0].result(), statistics(whole)
    assert result.count == expected.count == 300
    np.testing.assert_allclose(result.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(result.cov, expected.cov, rtol=1e-10, atol=1e-12 * np.abs(expected.cov).max())


def test_more_rows_than_a_chunk_are_summed_whole():
    whole = features(0, 9000, 3)
    np.testing.assert_allclose(statistics(whole).cov, np.cov(whole.astype(np.float64), rowvar=False),
                               rtol=1e-12)


def test_running_statistics_refuse_what_does_not_fit():
    running = RunningStatistics()
    with pytest.raises(UserError, match='at least 2 features, got 0'):
        running.result()
    running.add(features(0, 5, 3))
    with pytest.raises(UserError, match='4 dimensions, the ones before 3'):
        running.add(features(0, 5, 4))


def test_equal_rows_warn():
    with pytest.warns(UserWarning, match='all 5 rows of features are equal'):
        statistics(np.ones((5, 3)))


def test_integers_are_refused():
    with pytest.raises(UserError, match='features are uint8, expected floating point'):
        statistics(np.zeros((5, 3), np.uint8))


@pytest.mark.parametrize('stats, text', [
    (Statistics(np.zeros(3), np.zeros((3, 2))), r'covariance of shape \(3, 2\)'),
    (Statistics(np.zeros((3, 1)), np.zeros((3, 3))), r'mean of shape \(3, 1\)'),
    (Statistics(np.zeros(3), np.full((3, 3), np.nan)), 'not finite'),
])
def test_statistics_that_are_none_are_refused(stats, text):
    with pytest.raises(UserError, match=text):
        frechet_distance(statistics(features(0, 9, 3)), stats)
