"""Steps and whole trajectories against the official code with the same noise, and the samplers' common
contract."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import TAGS, load_nhwc, relative_error, tiny_dit, toy_model

from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.objective import p_mean_variance
from lit_jax.diffusion.samplers import SAMPLERS, ddim_reverse_step, ddim_step, ddpm_step, sampling_schedule
from lit_jax.diffusion.schedule import make_schedule
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError

PRECISION = [(jnp.float32, 2e-5), (jnp.float64, 1e-9)]   # the project's parity bounds
SCHEDULE = make_schedule(1000, '20')
NOISY = ('ddpm', 'ddim')       # those that can draw noise, and that the official code has


@pytest.mark.parametrize('dtype, bound', PRECISION)
@pytest.mark.parametrize('respacing, tag', TAGS.items())
def test_single_steps_equal_the_official_ones(respacing, tag, dtype, bound, goldens):
    _, _, arrays = load_nhwc(goldens / 'diffusion_toy.npz')
    schedule = make_schedule(1000, respacing)

    @jax.jit
    def compute(x, noise, t):
        output = toy_model(x, jnp.asarray(schedule.timestep_map)[t], {})
        args = schedule, p_mean_variance(schedule, output, x, t), x, t
        return {'p_sample': ddpm_step(*args, noise), 'ddim_reverse': ddim_reverse_step(*args),
                **{f'ddim_eta{eta}': ddim_step(*args, noise, eta) for eta in (0.0, 0.5, 1.0)}}

    with jax.enable_x64(dtype == jnp.float64):
        got = compute(arrays['in_x'].astype(dtype), arrays['in_noise'].astype(dtype),
                      arrays[f'in_t_{tag}'].astype(np.int32))
    for name, value in got.items():
        assert value.dtype == dtype
        assert relative_error(value, arrays[f'out64_{tag}_{name}']) <= bound, name


def assert_trajectory(got, want, dtype, bound):
    """Step by step, relative to the largest value of that step."""
    assert got.dtype == dtype and got.shape == want.shape and len(got) == 20
    errors = [relative_error(mine, official) for mine, official in zip(np.asarray(got), want, strict=True)]
    assert max(errors) <= bound, errors


@pytest.mark.parametrize('dtype, bound', PRECISION)
@pytest.mark.parametrize('method, eta, name', [('ddpm', 0.0, 'ddpm_loop'), ('ddim', 0.0, 'ddim_loop_eta0.0'),
                                               ('ddim', 1.0, 'ddim_loop_eta1.0')])
def test_twenty_steps_equal_the_official_ones(method, eta, name, dtype, bound, goldens):
    _, _, arrays = load_nhwc(goldens / 'diffusion_toy.npz')
    with jax.enable_x64(dtype == jnp.float64):
        x_T, noise = jnp.asarray(arrays['in_loop_x'], dtype), jnp.asarray(arrays['in_loop_noise'], dtype)
        got = SAMPLERS[method](toy_model, x_T, {}, schedule=SCHEDULE, noise=noise, eta=eta, trajectory=True)
    assert_trajectory(got, arrays[f'out64_{name}'], dtype, bound)


def test_the_predicted_images_along_the_way_equal_the_official_ones(goldens, x64):
    _, _, arrays = load_nhwc(goldens / 'diffusion_toy.npz')
    states = np.concatenate([arrays['in_loop_x'][None].astype(np.float64), arrays['out64_ddpm_loop'][:-1]])

    @jax.jit
    def predict(x, t):
        output = toy_model(x, jnp.asarray(SCHEDULE.timestep_map)[t], {})
        return p_mean_variance(SCHEDULE, output, x, t).x0

    for index, x, want in zip(range(19, -1, -1), states, arrays['out64_ddpm_loop_pred_xstart'], strict=True):
        assert relative_error(predict(x, np.full(2, index)), want) <= 1e-9


@pytest.mark.parametrize('dtype, bound', PRECISION)
def test_a_guided_model_follows_the_official_trajectory(dtype, bound, goldens):
    """The official loop carries the null half along and discards it: only the first half is compared."""
    meta, arrays, arch, params = tiny_dit(goldens)
    network = Network(arch, dtype=dtype)
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        model = guide(lambda *args: network.apply(params, *args), meta['case']['cfg'], network.guidance_pair)

        @jax.jit
        def compute(x_T, noise, cond):
            options = {'schedule': SCHEDULE, 'noise': noise, 'trajectory': True}
            loops = {name: SAMPLERS[name](model, x_T, cond, **options) for name in NOISY}
            first = jnp.full(2, SCHEDULE.num_steps - 1)
            output = model(x_T, jnp.asarray(SCHEDULE.timestep_map)[first], cond)
            return loops, p_mean_variance(SCHEDULE, output, x_T, first)

        loops, prediction = compute(arrays['in_loop_x'][:2].astype(dtype),
                                    arrays['in_loop_noise'][:, :2].astype(dtype),
                                    {'label': arrays['in_loop_y'][:2].astype(np.int32)})
    for method, states in loops.items():
        assert_trajectory(states, arrays[f'out64_{method}_loop'][:, :2], dtype, bound)
    for value, name in ((prediction.mean, 'mean'), (prediction.log_variance, 'log_variance'),
                        (prediction.x0, 'pred_xstart')):
        assert relative_error(value, arrays[f'out64_pmv_{name}'][:2]) <= bound, name


def noise_like(x, seed=1):
    return np.random.default_rng(seed).normal(size=(SCHEDULE.num_steps, *x.shape)).astype(np.float32)


@pytest.fixture
def x_T():
    return np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize('method', SAMPLERS)
def test_the_model_is_told_original_timesteps_from_the_noisiest_down(method, x_T):
    seen = []

    def model(x, t, cond):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        assert t.dtype == jnp.int32
        return toy_model(x, t, cond)

    SAMPLERS[method](model, x_T, {}, schedule=SCHEDULE, noise=noise_like(x_T)).block_until_ready()
    jax.effects_barrier()
    told = SCHEDULE.timestep_map[method not in NOISY:]    # the solvers only end at the lowest level
    np.testing.assert_array_equal(np.stack(seen), np.repeat(told[::-1, None], 2, axis=1))


@pytest.mark.parametrize('method', SAMPLERS)
def test_the_trajectory_ends_at_the_sample(method, x_T):
    options = {'schedule': SCHEDULE, 'noise': noise_like(x_T), 'eta': 1.0}
    states = SAMPLERS[method](toy_model, x_T, {}, **options, trajectory=True)
    np.testing.assert_array_equal(states[-1], SAMPLERS[method](toy_model, x_T, {}, **options))


@pytest.mark.parametrize('method', NOISY)
def test_the_last_noise_has_no_effect_and_the_others_have(method, x_T):
    @jax.jit
    def sample(noise):
        return SAMPLERS[method](toy_model, x_T, {}, schedule=SCHEDULE, noise=noise, eta=1.0)

    noise, other_end, other_middle = (noise_like(x_T) for _ in range(3))
    other_end[-1], other_middle[-2] = 100.0, 1.0
    np.testing.assert_array_equal(sample(other_end), sample(noise))
    assert not np.allclose(sample(other_middle), sample(noise))


@pytest.mark.parametrize('method', NOISY)
def test_a_key_decides_the_noise(method, x_T):
    @jax.jit
    def sample(seed):
        return SAMPLERS[method](toy_model, x_T, {}, schedule=SCHEDULE, key=jax.random.key(seed), eta=1.0)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert not np.allclose(sample(0), sample(1))


@pytest.mark.parametrize('method', NOISY)
def test_every_image_and_step_has_noise_of_its_own(method, x_T):
    """atol: the two programs may be fused differently; states are of order 1."""
    keys, options = jax.random.split(jax.random.key(2), 2), {'schedule': SCHEDULE, 'eta': 1.0}
    noise = jnp.stack([jnp.stack([jax.random.normal(jax.random.fold_in(key, i), x_T.shape[1:])
                                  for key in keys])
                       for i in range(20)])
    np.testing.assert_allclose(SAMPLERS[method](toy_model, x_T, {}, **options, key=keys),
                               SAMPLERS[method](toy_model, x_T, {}, **options, noise=noise), atol=1e-5)


@pytest.mark.parametrize('method', NOISY)
def test_a_image_is_the_same_in_any_company(method, x_T):
    """Alone, among others, and at another place: its key decides. atol: programs of other shapes round
    differently."""
    keys, x = jax.random.split(jax.random.key(3), 5), np.concatenate([x_T, 2 * x_T, -x_T[:1]])

    def sample(rows):
        rows = np.asarray(rows)
        return SAMPLERS[method](toy_model, x[rows], {}, schedule=SCHEDULE, eta=1.0, key=keys[rows])

    together = sample([0, 1, 2, 3, 4])
    np.testing.assert_allclose(sample([4, 2]), together[np.array([4, 2])], atol=1e-5)
    np.testing.assert_allclose(sample([3]), together[3:4], atol=1e-5)


def test_one_key_for_all_still_gives_different_noise(x_T):
    same = np.repeat(x_T[:1], 2, axis=0)
    got = SAMPLERS['ddpm'](toy_model, same, {}, schedule=SCHEDULE, key=jax.random.key(0))
    assert not np.allclose(got[0], got[1])


def test_keys_that_do_not_fit_the_images_are_refused(x_T):
    with pytest.raises(UserError, match='2 images need 2 random keys'):
        SAMPLERS['ddpm'](toy_model, x_T, {}, schedule=SCHEDULE, key=jax.random.split(jax.random.key(0), 3))


def test_deterministic_ddim_needs_no_noise_and_ignores_it(x_T):
    sample = SAMPLERS['ddim']
    plain = sample(toy_model, x_T, {}, schedule=SCHEDULE)
    np.testing.assert_array_equal(sample(toy_model, x_T, {}, schedule=SCHEDULE, noise=noise_like(x_T)), plain)


# dpm++original ends with the noise of the lowest level
@pytest.mark.parametrize('method', (*NOISY, 'dpm++'))
def test_clipping_holds_the_last_image_in_range(method, x_T):
    """The last step has no noise and lands on the predicted x0, up to float32 rounding."""
    def sample(clip):
        return SAMPLERS[method](toy_model, 3 * x_T, {}, schedule=SCHEDULE, noise=3 * noise_like(x_T),
                                clip_denoised=clip)

    assert np.abs(sample(False)).max() > 1.1
    assert np.abs(sample(True)).max() <= 1 + 1e-5


@pytest.mark.parametrize('method', SAMPLERS)
def test_the_state_stays_float32_around_a_bfloat16_model(method, x_T):
    def model(x, t, cond):
        assert x.dtype == jnp.float32
        return toy_model(x, t, cond).astype(jnp.bfloat16)

    got = SAMPLERS[method](model, x_T.astype(jnp.bfloat16), {}, schedule=SCHEDULE, noise=noise_like(x_T))
    assert got.dtype == jnp.float32 and np.isfinite(got).all()


@pytest.mark.parametrize('method', NOISY)
def test_noise_comes_from_exactly_one_place(method, x_T):
    for given in ({}, {'key': jax.random.key(0), 'noise': noise_like(x_T)}):
        with pytest.raises(UserError, match='one of key'):
            SAMPLERS[method](toy_model, x_T, {}, schedule=SCHEDULE, eta=1.0, **given)


@pytest.mark.parametrize('method', NOISY)
def test_noise_must_cover_every_step(method, x_T):
    with pytest.raises(UserError, match='one entry for each step'):
        SAMPLERS[method](toy_model, x_T, {}, schedule=SCHEDULE, eta=1.0, noise=noise_like(x_T)[1:])


@pytest.mark.parametrize('eta', [-0.1, 1.5, float('nan')])
def test_eta_out_of_range_is_refused(eta, x_T):
    with pytest.raises(UserError, match='between 0'):
        SAMPLERS['ddim'](toy_model, x_T, {}, schedule=SCHEDULE, key=jax.random.key(0), eta=eta)


@pytest.mark.parametrize('method', SAMPLERS)
def test_so_many_steps_are_so_many_evaluations(method, x_T):
    calls = []

    def model(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return toy_model(x, t, cond)

    schedule = sampling_schedule(method, 7)
    states = SAMPLERS[method](model, x_T, {}, schedule=schedule, key=jax.random.key(0), trajectory=True)
    jax.effects_barrier()
    assert len(states) == len(calls) == 7


@pytest.mark.parametrize('method, steps, message', [
    ('euler', 10, r'known: ddpm, ddim, dpm\+\+'), ('ddpm', 0, 'at least 1'), ('ddim', 1, 'at least 2'),
    ('dpm++', 1000, 'at most 1000'), ('dpm++original', 0, 'at least 1'), ('ddpm', 1001, 'at most 1000')])
def test_a_schedule_that_cannot_be_is_refused(method, steps, message):
    with pytest.raises(UserError, match=message):
        sampling_schedule(method, steps)
