"""Precision, recall, density and coverage: equal to the float64 counts for any blocks and devices, and to
other packages."""
import contextlib
import io

import jax
import numpy as np
import pytest
from feature_sets import GOLDEN, HARD, features, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import import_oracle

from lit_jax.metrics.distances import Geometry
from lit_jax.metrics.manifold import density_coverage, precision_recall
from lit_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures('two_devices')


def squared_distances(first, second):
    """The definition, float64 [N, M]."""
    return np.array([np.square(second.astype(np.float64) - row).sum(axis=1)
                     for row in first.astype(np.float64)])


def half_distances(first, second):
    """What the ADM evaluator computes: float16 operations, sums and products exact before each rounding."""
    first, second = first.astype(np.float16), second.astype(np.float16)
    norms = [np.square(x.astype(np.float64)).sum(1).astype(np.float16) for x in (first, second)]
    product = (first.astype(np.float64) @ second.astype(np.float64).T).astype(np.float16)
    return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1], np.float16(0))


def brute_precision_recall(samples, reference, k=3, distances=squared_distances):
    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (samples, reference)]
    between = distances(reference, samples)
    return (between <= radii[1][:, None]).any(0).mean(), (between <= radii[0]).any(1).mean()


def brute_density_coverage(samples, reference, k=5):
    radii = np.sort(squared_distances(reference, reference), axis=1)[:, k]
    inside = squared_distances(reference, samples) < radii[:, None]
    return inside.sum() / (k * len(samples)), inside.any(1).mean()


def clusters(seed, count, dims=16):
    """Two places far apart with next to no spread: in float32 all rows of a place are one."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(7).normal(size=(2, dims)) * 100
    return places[rng.integers(0, 2, count)] + 1e-5 * rng.normal(size=(count, dims))


VERY_HARD = HARD | {
    'identical sets': (features(0, 90, 12), features(0, 90, 12)),
    'a part of the reference': (features(0, 90, 12)[::3], features(0, 90, 12)),
    'nearly equal rows': (clusters(0, 150), clusters(1, 120)),
    'one far away': (np.vstack([features(0, 60, 8), 1e7 * np.ones((1, 8), np.float32)]), features(1, 50, 8)),
    'next to nothing': (1e-25 * features(0, 60, 8), 1e-25 * features(1, 50, 8)),
    'as large as float32': (1e37 * features(0, 60, 8), 1e37 * features(1, 50, 8)),
}


@pytest.mark.parametrize('name', GOLDEN)
def test_equals_the_adm_evaluator_and_torch_fidelity(goldens, name):
    samples, reference, arrays, _ = golden(goldens, name)
    counts = np.array([len(samples), len(reference)])
    found = precision_recall(samples, reference)
    for oracle in ('adm_%s_fp32', 'tfid_%s', 'own_%s_f64'):
        expected = np.array([arrays[oracle % 'precision'], arrays[oracle % 'recall']])
        np.testing.assert_array_equal(np.rint(found * counts), np.rint(expected * counts))
    np.testing.assert_array_equal(np.rint(found * counts), found * counts)


@pytest.mark.parametrize('name', GOLDEN)
def test_float16_equals_its_emulation_and_the_adm_evaluator_within_two_rows(goldens, name):
    samples, reference, arrays, _ = golden(goldens, name)
    found = precision_recall(samples, reference, mode='adm_float16')
    assert found == (arrays['own_precision_f16emu'], arrays['own_recall_f16emu'])
    assert found == brute_precision_recall(samples, reference, distances=half_distances)
    assert abs(found.precision - arrays['adm_precision_fp16']) * len(samples) < 2.5
    assert abs(found.recall - arrays['adm_recall_fp16']) * len(reference) < 2.5


def test_radii_equal_the_adm_evaluator(goldens):
    samples, reference, arrays, _ = golden(goldens, 'features2048')
    geometry = Geometry(reference, samples)
    for rows, name in zip(geometry.sets, ('real', 'fake'), strict=True):
        radii = geometry.neighbour_distances(rows, 3)
        np.testing.assert_allclose(radii, arrays[f'own_radii_{name}_f64'], rtol=1e-12)
        np.testing.assert_allclose(radii, arrays[f'adm_radii_{name}_fp32'], rtol=1e-4)


@pytest.mark.parametrize('name', VERY_HARD)
def test_counts_are_those_of_float64(name):
    samples, reference = VERY_HARD[name]
    assert precision_recall(samples, reference) == brute_precision_recall(samples, reference)
    if min(len(samples), len(reference)) > 5:
        assert density_coverage(samples,
                                reference) == pytest.approx(brute_density_coverage(samples, reference),
                                                            rel=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize('name', HARD)
def test_equals_torch_fidelity_and_prdc(name):
    torch, fidelity = import_oracle('torch'), import_oracle('torch_fidelity.metric_prc')
    prdc = import_oracle('prdc')
    samples, reference = (x.astype(np.float64) for x in HARD[name])
    counts = np.array([len(samples), len(reference)])
    found = np.rint(counts * precision_recall(samples, reference))
    theirs = fidelity.prc_features_to_metric(torch.from_numpy(samples), torch.from_numpy(reference),
                                             verbose=False)
    np.testing.assert_array_equal(found, np.rint(counts * [theirs['precision'], theirs['recall']]))
    with contextlib.redirect_stdout(io.StringIO()):
        three, five = (prdc.compute_prdc(reference, samples, k) for k in (3, 5))
    np.testing.assert_array_equal(found, np.rint(counts * [three['precision'], three['recall']]))
    assert density_coverage(samples,
                            reference) == pytest.approx((five['density'], five['coverage']), rel=1e-12)


GRID = st.integers(0, 2)


@settings(deadline=None, max_examples=12)
@given(samples=st.lists(st.tuples(GRID, GRID, GRID), min_size=7, max_size=7),
       reference=st.lists(st.tuples(GRID, GRID, GRID), min_size=6, max_size=6), k=st.integers(1, 4))
def test_ties_and_duplicates_count_as_in_float64(samples, reference, k):
    """On a small grid most distances are tied and most rows come twice."""
    samples, reference = np.array(samples, np.float32), np.array(reference, np.float32)
    if (samples == samples[0]).all() or (reference == reference[0]).all():
        samples[0, 0], reference[0, 0] = 7, 7
    found = precision_recall(samples, reference, neighbours=k, devices=jax.devices()[:1])
    assert found == brute_precision_recall(samples, reference, k)
    assert found == precision_recall(reference, samples, neighbours=k, devices=jax.devices()[:1])[::-1]
    density = density_coverage(samples, reference, neighbours=k, devices=jax.devices()[:1])
    assert density == pytest.approx(brute_density_coverage(samples, reference, k), rel=1e-14)


@pytest.mark.parametrize('mode', ['float32', 'adm_float16'])
@pytest.mark.parametrize('name', ['full rank', 'nearly equal rows'])
def test_blocks_and_devices_change_nothing(mode, name):
    samples, reference = (rows[:64] for rows in VERY_HARD[name])
    expected = precision_recall(samples, reference, mode=mode)
    for block, devices in (((32, 8), 3), ((1000, 29), 1)):
        found = precision_recall(samples, reference, mode=mode, block=block, devices=jax.devices()[:devices])
        assert found == expected
    assert density_coverage(samples, reference, block=(32, 8)) == density_coverage(samples, reference)


@pytest.mark.parametrize('half', [False, True])
def test_the_rim_belongs_to_closed_balls_only_and_is_a_rounding_wide(half):
    """Every pair has its own distance as radius, then the next smaller number: float32 alone would get many
    wrong."""
    count = 1500
    geometry = Geometry(features(1, 1, 2048), features(0, count, 2048), half=half)
    real, fake = geometry.sets
    rim = geometry.exact(real, fake, np.zeros(count, int), np.arange(count))
    less = np.nextafter(rim.astype(np.float16 if half else np.float64), 0).astype(np.float64)
    for radii, closed, expected in ((rim, True, count), (rim, False, 0), (less, True, 0)):
        assert geometry.counts_within(real, fake, col_radii=radii, closed=closed) == [expected]
        turned = geometry.counts_within(fake, real, row_radii=radii, closed=closed, columns_first=True)
        assert turned.sum() == expected


def test_recall_is_precision_with_the_roles_swapped():
    samples, reference = features(0, 120, 10, 0.5), features(1, 80, 10)
    found = precision_recall(samples, reference)
    assert found.precision > found.recall          # samples of less spread look real and miss the rest
    assert precision_recall(reference, samples) == found[::-1]


def test_float16_takes_exact_distances_where_it_would_overflow(goldens):
    samples, reference, arrays, _ = golden(goldens, 'features64')
    found = precision_recall(64 * samples, 64 * reference, mode='adm_float16')
    assert found == (arrays['adm_precision_fp32'], arrays['adm_recall_fp32'])


def test_float16_overflows_block_by_block():
    """One row too long for float16 turns its own 10000 rows to float32, not the others."""
    samples, reference = features(0, 10040, 4), features(1, 40, 4)
    samples[0] *= 1e3
    geometry = Geometry(reference, samples, half=True, block=(4096, 4096))
    real, fake = geometry.sets
    i, j = np.zeros(10040, int), np.arange(10040)
    found = geometry.exact(real, fake, i, j)
    np.testing.assert_array_equal(found[:10000], squared_distances(reference[:1], samples[:10000])[0])
    np.testing.assert_array_equal(found[10000:], half_distances(reference[:1], samples[10000:])[0])
    radii = np.full(10040, 0.25)
    expected = (found <= radii).sum()
    assert geometry.counts_within(real, fake, col_radii=radii)[0] == expected
    assert geometry.counts_within(fake, real, row_radii=radii,
                                  columns_first=True).sum() == geometry.counts_within(
real, fake, col_radii=radii).sum()


@pytest.mark.parametrize('samples, reference, options, text', [
    (features(0, 3, 4), features(1, 9, 4), {},
     r'samples have shape \(3, 4\), expected \[N, d\] with at least 4 rows'),
    (features(0, 9, 4), features(1, 9, 5), {}, 'samples have 4 dimensions and the reference 5'),
    (features(0, 9, 4), features(1, 9, 4), {'neighbours': 0}, 'neighbours is 0'),
    (features(0, 9, 4), features(1, 9, 4), {'mode': 'half'},
     "mode is 'half', expected one of float32, adm_float16"),
    (features(0, 9, 4), features(1, 9, 4), {'block': (0, 4)}, 'block of 0 x 4'),
    (features(0, 9, 4).astype(np.uint8), features(1, 9, 4), {}, 'samples are uint8, expected floating point'),
    (features(0, 9, 4) * np.nan, features(1, 9, 4), {}, '9 of 9 rows of samples are not finite'),
])
def test_unusable_input_is_refused(samples, reference, options, text):
    with pytest.raises(UserError, match=text):
        precision_recall(samples, reference, **options)


def test_equal_rows_warn_and_count():
    """All samples one image that lies in the middle: precise, but they cover no more than their own place."""
    reference = features(0, 40, 4)
    with pytest.warns(UserWarning, match='all 6 rows of samples are equal'):
        found = precision_recall(np.repeat(reference[:1], 6, 0), reference)
    assert found == (1.0, 1 / 40)
