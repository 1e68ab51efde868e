"""DPM-Solver++(2M) against PixArt's own solver, diffusers' scheduler, and the ordinary differential equation
it solves."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import load_nhwc, relative_error, toy_model
from draws import normal
from torchvision_shim import import_oracle

from lit_jax.diffusion.dpm_solver import sample_dpm, sample_dpm_original, solver_coefficients
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.samplers import sample_ddim, sampling_schedule
from lit_jax.diffusion.schedule import make_schedule, spread_levels


def conditional_toy_model(x, t, cond):
    """The model of pixart_dpm (formula in tests/goldens/README.md); its learned variance is not looked at."""
    u = (t.astype(x.dtype) / 1000).reshape(-1, 1, 1, 1)
    s = jnp.sqrt(1 - jnp.exp(-(0.1 * u + 9.95 * u * u)))
    noise = s * x + 0.1 * jnp.sin(2 * x + 5 * u) + 0.2 * cond['text'] * jnp.cos(3 * u)
    return jnp.concatenate([noise, x], -1)


def with_and_without(cond):
    return {'text': cond['text']}, {'text': cond['null_text']}


@pytest.mark.parametrize('dtype, bound', [(jnp.float32, 2e-5), (jnp.float64, 1e-9)])
def test_the_trajectory_equals_that_of_the_original_code(dtype, bound, goldens):
    """Guided, all twenty steps, each relative to the largest value of its own state."""
    meta, _, arrays = load_nhwc(goldens / 'pixart_dpm.npz')
    told = []

    def model(x, t, cond):
        jax.debug.callback(lambda t: told.append(np.asarray(t)), t, ordered=True)
        assert x.dtype == t.dtype == dtype
        return conditional_toy_model(x, t, cond)

    with jax.enable_x64(dtype == jnp.float64):
        x_T, text, null = (jnp.asarray(arrays[name], dtype) for name in ('in_z', 'in_cond', 'in_uncond'))
        schedule = sampling_schedule('dpm++original', meta['case']['steps'])
        states = sample_dpm_original(guide(model, meta['case']['cfg'], with_and_without, 'all'), x_T,
                                     {'text': text, 'null_text': null}, schedule=schedule, trajectory=True)
        jax.effects_barrier()
    assert states.dtype == dtype and len(states) == 20
    errors = [relative_error(mine, official)
              for mine, official in zip(states, arrays['out64_states'][1:], strict=True)]
    assert max(errors) <= bound, errors
    assert np.shape(told) == (20, 4)      # both halves of two guided images
    np.testing.assert_allclose(told, np.repeat(arrays['out64_model_t'][:, None], 4, 1), rtol=0,
                               atol=1e-9 if dtype == jnp.float64 else 1e-4)


def test_levels_and_times_are_those_of_the_original_code(goldens):
    _, _, arrays = load_nhwc(goldens / 'pixart_dpm.npz')
    schedule = spread_levels(1000, 21)
    levels = schedule.alphas_cumprod[::-1]
    alpha, sigma = np.sqrt(levels), np.sqrt(1 - levels)
    ours = {'times': (schedule.timestep_map[::-1] + 1) / 1000, 'log_alpha': np.log(alpha), 'sigma': sigma,
            'lambda': np.log(alpha / sigma)}
    for name, value in ours.items():
        assert relative_error(value, arrays[f'out64_{name}']) <= 1e-9, name
    np.testing.assert_allclose(schedule.timestep_map[:0:-1], arrays['out64_model_t'], rtol=0, atol=1e-9)


def test_levels_between_timesteps_meet_the_schedule_at_whole_ones():
    """All levels of it, and twice as many: every other one is a timestep, the others are geometric means."""
    for steps in (100, 1000):
        whole = make_schedule(steps).alphas_cumprod
        np.testing.assert_allclose(spread_levels(steps, steps).alphas_cumprod, whole, rtol=1e-12)
        twice = spread_levels(steps, 2 * steps - 1)
        np.testing.assert_allclose(twice.alphas_cumprod[::2], whole, rtol=1e-12)
        np.testing.assert_allclose(twice.alphas_cumprod[1::2], np.sqrt(whole[1:] * whole[:-1]), rtol=1e-12)
        np.testing.assert_array_equal(twice.timestep_map, np.arange(0, steps - 0.5, 0.5))


def noise_only(x, t):
    return toy_model(x, t, {})[..., :x.shape[-1]]


@pytest.mark.peers
@pytest.mark.parametrize('steps', [2, 10, 20, 50])
def test_the_trajectory_equals_that_of_diffusers(steps, x64):
    import torch
    diffusers = import_oracle('diffusers')
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, trained_betas=np.linspace(1e-4, 2e-2, 1000), algorithm_type='dpmsolver++',
        solver_order=2)
    schedule = sampling_schedule('dpm++', steps)
    x_T = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    ours = sample_dpm(toy_model, jnp.asarray(x_T), {}, schedule=schedule, trajectory=True)
    # Its own timesteps are the same but for the rounding of exact halves; here all are the same.
    scheduler.set_timesteps(timesteps=schedule.timestep_map[:0:-1].tolist())
    x = torch.from_numpy(x_T)
    for i, t in enumerate(scheduler.timesteps):
        output = noise_only(jnp.asarray(x.numpy()), jnp.full(2, int(t)))
        x = scheduler.step(torch.from_numpy(np.array(output)), t, x).prev_sample
        # 5e-6: its noise levels are float32, whatever the state is.
        assert relative_error(ours[i], x.numpy()) <= 5e-6, i


@pytest.mark.peers
def test_timesteps_are_those_of_diffusers_but_for_halves():
    diffusers = import_oracle('diffusers')
    for steps in (5, 10, 15, 20, 25, 50, 100):
        scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(steps)
        assert np.abs(scheduler.timesteps.numpy()
                      - sampling_schedule('dpm++', steps).timestep_map[:0:-1]).max() <= 1


def test_fewer_steps_than_ddim_come_closer_to_the_exact_path(x64):
    """A thousand steps of DDIM stand for the exact solution, which both approach; doubling the steps quarters
    the error."""
    x_T = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)))
    exact = sample_ddim(toy_model, x_T, {}, schedule=make_schedule(1000))

    def error(sampler, method, steps):
        return relative_error(sampler(toy_model, x_T, {}, schedule=sampling_schedule(method, steps)), exact)

    assert error(sample_dpm, 'dpm++', 10) < error(sample_ddim, 'ddim', 20)
    assert error(sample_dpm, 'dpm++', 40) < 0.5 * error(sample_dpm, 'dpm++', 10)


def test_the_original_variant_comes_to_the_exact_path_at_the_lowest_level(x64):
    """Many of its steps against many of DDIM's without the last one, which leads from the lowest level to no
    noise."""
    x_T = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)))
    exact = sample_ddim(toy_model, x_T, {}, schedule=make_schedule(1000), trajectory=True)[-2]

    def error(steps):
        return relative_error(sample_dpm_original(toy_model, x_T, {},
                                                  schedule=sampling_schedule('dpm++original', steps)), exact)

    assert error(400) < 5e-3 and error(40) < 0.5 * error(10)


def test_a_perfect_prediction_is_reached_in_any_number_of_steps():
    """A model that knows the image: every step moves along the straight line of DDIM, the last one lands on
    it."""
    image = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 4, 3)), jnp.float32)
    alphas = jnp.asarray(make_schedule(1000).alphas_cumprod, jnp.float32)

    def model(x, t, cond):
        level = alphas[t][:, None, None, None]
        return jnp.concatenate([(x - jnp.sqrt(level) * image) / jnp.sqrt(1 - level), jnp.zeros_like(x)], -1)

    x_T = normal(0, image.shape)
    for steps in (1, 2, 7):
        got = sample_dpm(model, x_T, {}, schedule=sampling_schedule('dpm++', steps))
        np.testing.assert_allclose(got, image, atol=2e-3)      # the first prediction divides by 0.006


def test_the_original_variant_leaves_the_noise_of_the_lowest_level():
    """Of a perfect prediction: α·image + σ·(the noise that it began with), in any number of steps and any
    schedule."""
    image = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 4, 3)), jnp.float32)
    for train_steps, steps in ((1000, 1), (1000, 2), (1000, 7), (100, 7)):
        schedule = sampling_schedule('dpm++original', steps, train_steps)
        whole = make_schedule(train_steps).alphas_cumprod

        def model(x, t, cond, whole=whole):
            level = jnp.exp(jnp.interp(t, jnp.arange(len(whole)),
                                       jnp.log(jnp.asarray(whole, x.dtype))))[:, None, None, None]
            return jnp.concatenate([(x - jnp.sqrt(level) * image) / jnp.sqrt(1 - level), jnp.zeros_like(x)],
                                   -1)

        noise = normal(0, image.shape)
        x_T = np.sqrt(whole[-1]) * image + np.sqrt(1 - whole[-1]) * noise
        got = sample_dpm_original(model, x_T, {}, schedule=schedule)
        np.testing.assert_allclose(got, np.sqrt(whole[0]) * image + np.sqrt(1 - whole[0]) * noise, atol=2e-3)


def test_the_first_and_the_last_step_are_of_first_order():
    table = solver_coefficients([0.1, 0.5, 0.9, 1.0], [0.995, 0.87, 0.44, 0.0])
    assert table.shape == (3, 3) and table[0, 2] == table[2, 2] == 0 and table[1, 2] > 0
    np.testing.assert_array_equal(table[2, :2], [0, 1])       # to the predicted image itself
