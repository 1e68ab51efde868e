"""Tables and respacing against the official ones, and what no respacing may break."""
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import TAGS, load_nhwc
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.diffusion.schedule import look_up, make_schedule, respace
from lit_jax.runtime.errors import UserError

OTHER_NAMES = {'posterior_log_variance_clipped': 'posterior_log_variance'}
NOT_KEPT = {'log_one_minus_alphas_cumprod'}   # nothing here needs it


@pytest.mark.parametrize('respacing, tag', TAGS.items())
def test_tables_equal_the_official_ones(respacing, tag, goldens):
    """rtol: both are float64; a few rounding steps may fall differently."""
    _, _, arrays = load_nhwc(goldens / 'diffusion_tables.npz')
    schedule = make_schedule(1000, respacing)
    prefix = f'table_{tag}_'
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert len(names) == 14
    for name in set(names) - NOT_KEPT:
        table = getattr(schedule, OTHER_NAMES.get(name, name))
        np.testing.assert_allclose(table, arrays[prefix + name], rtol=1e-13, atol=0, err_msg=name)
        assert table.dtype == (np.int32 if name == 'timestep_map' else np.float64)


def test_further_timestep_maps_equal_the_official_ones(goldens):
    _, _, arrays = load_nhwc(goldens / 'diffusion_tables.npz')
    maps = {key.removeprefix('map_'): value for key, value in arrays.items() if key.startswith('map_')}
    assert len(maps) == 5
    for respacing, want in maps.items():
        np.testing.assert_array_equal(respace(1000, respacing), want)


def test_rounding_follows_the_accumulated_sum(goldens):
    """Exactly the counts that the golden file lists differ from rounding each multiple of the stride."""
    meta, _, _ = load_nhwc(goldens / 'diffusion_tables.npz')
    differing = [n for n in range(2, 1001)
                 if not np.array_equal(respace(1000, str(n)), [round(j * 999 / (n - 1)) for j in range(n)])]
    assert differing == meta['rounding_differs_for_counts']
    assert respace(1000, '21')[10] == 499


def test_the_linear_schedule_by_hand():
    schedule = make_schedule(1000)
    assert schedule.betas[0] == pytest.approx(1e-4,
                                              rel=1e-12) and schedule.betas[-1] == pytest.approx(
                                                  0.02, rel=1e-12)
    assert schedule.alphas_cumprod[1] == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rel=1e-12)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    assert make_schedule(100).betas[-1] == pytest.approx(0.2, rel=1e-12)


def test_tables_cannot_be_written():
    with pytest.raises(ValueError, match='read-only'):
        make_schedule(100).betas[0] = 1


sections = st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda counts: sum(counts) > 1)


@given(sections, st.integers(200, 1500))
def test_section_maps_are_sorted_unique_and_start_at_zero(counts, steps):
    kept = respace(steps, ','.join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert kept[0] == 0 and kept[-1] < steps
    assert (np.diff(kept) > 0).all()
    if len(counts) == 1:
        assert kept[-1] == steps - 1


@given(st.integers(21, 1500), st.data())
def test_ddim_maps_have_one_stride(steps, data):
    stride = data.draw(st.integers(1, steps - 1))
    count = len(range(0, steps, stride))
    kept = respace(steps, f'ddim{count}')
    assert len(kept) == count and kept[0] == 0 and kept[-1] < steps
    assert len(set(np.diff(kept))) == 1


@given(sections, st.integers(200, 1500))
def test_respacing_keeps_the_cumulative_products(counts, steps):
    """rtol: as β = 1 - ratio, a ratio as small as 4e-5 keeps 11 of float64's 16 digits."""
    schedule, full = make_schedule(steps, ','.join(map(str, counts))), make_schedule(steps)
    np.testing.assert_allclose(schedule.alphas_cumprod, full.alphas_cumprod[schedule.timestep_map],
                               rtol=1e-10)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert all(np.isfinite(value).all() for name, value in vars(schedule).items())


@pytest.mark.parametrize('steps, respacing, message', [
    (1000, '1001', 'at most 1000'), (100, '250', 'at most 100'), (90, '10,31,20', 'section 2 of 3 has 30'),
    (1000, 'ddim300', 'ddim250 or ddim334'), (1000, 'ddim1001', 'ddim500 or ddim1000'),
    (1000, 'ddim1', 'ddim2 or'), (1000, 'ddim', 'cannot read'), (1000, 'ddim5,5', 'one number'),
    (1000, 'fast', 'cannot read'), (1000, '0', 'cannot read'), (1000, '-5', 'cannot read'),
    (1000, '10,,20', 'cannot read'), (1000, '2.5', 'cannot read'), (1000, '1', 'at least 2')])
def test_an_impossible_respacing_says_why(steps, respacing, message):
    with pytest.raises(UserError, match=message):
        make_schedule(steps, respacing)


def test_an_impossible_schedule_says_why():
    with pytest.raises(UserError, match='at least 21'):
        make_schedule(20)
    with pytest.raises(UserError, match='known: linear'):
        make_schedule(1000, kind='quadratic')


@pytest.mark.parametrize('given, looked_up', [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)])
def test_look_up_gives_the_accumulator_of_its_partner(given, looked_up):
    schedule = make_schedule(100)
    values = look_up(schedule.betas, jnp.array([0, 99]), jnp.zeros((2, 3, 3, 1), given))
    assert values.shape == (2, 1, 1, 1) and values.dtype == looked_up
    np.testing.assert_array_equal(values.ravel(), schedule.betas[[0, 99]].astype(np.float32))


def test_look_up_keeps_float64(x64):
    schedule = make_schedule(100)
    values = look_up(schedule.betas, jnp.array([7]), jnp.zeros((1, 2), jnp.float64))
    assert values[0, 0] == schedule.betas[7]
