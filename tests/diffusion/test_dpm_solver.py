"""DPM-Solver++(2M) against PixArt's own solver, diffusers' scheduler, and the ordinary differential equation it solves."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import load_nhwc, relative_error, toy_model
from torchvision_shim import import_oracle

from lit_jax.diffusion.dpm_solver import sample_dpm, solver_coefficients
from lit_jax.diffusion.samplers import sample_ddim, sampling_schedule
from lit_jax.diffusion.schedule import make_schedule


def test_steps_equal_those_of_the_official_solver(goldens):
    """In float64, with the golden's own noise levels: its times lie between timesteps, where our schedule has no levels."""
    meta, _, arrays = load_nhwc(goldens / 'pixart_dpm.npz')
    alpha, sigma = np.exp(arrays['out64_log_alpha']), arrays['out64_sigma']
    cond, uncond = (arrays[name].astype(np.float64) for name in ('in_cond', 'in_uncond'))

    def noise(x, t):
        u = t / 1000
        s = np.sqrt(1 - np.exp(-(0.1 * u + 9.95 * u * u)))
        e_uncond, e_cond = (s * x + 0.1 * np.sin(2 * x + 5 * u) + 0.2 * c * np.cos(3 * u) for c in (uncond, cond))
        return e_uncond + meta['case']['cfg'] * (e_cond - e_uncond)

    x, before = arrays['in_z'].astype(np.float64), 0.0
    for i, (a, b, c) in enumerate(solver_coefficients(alpha, sigma)):
        x0 = (x - sigma[i] * noise(x, arrays['out64_model_t'][i])) / alpha[i]
        x, before = a * x + b * (x0 + c * (x0 - before)), x0
        # 1e-8: the official noise levels carry the rounding of a float32 table.
        assert relative_error(x, arrays['out64_states'][i + 1]) <= 1e-8, i


def noise_only(x, t):
    return toy_model(x, t, {})[..., :x.shape[-1]]


@pytest.mark.torch
@pytest.mark.parametrize('steps', [2, 10, 20, 50])
def test_the_trajectory_equals_that_of_diffusers(steps, x64):
    torch = pytest.importorskip('torch')
    diffusers = import_oracle('diffusers')
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, trained_betas=np.linspace(1e-4, 2e-2, 1000), algorithm_type='dpmsolver++', solver_order=2)
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


@pytest.mark.torch
def test_timesteps_are_those_of_diffusers_but_for_halves():
    diffusers = import_oracle('diffusers')
    for steps in (5, 10, 15, 20, 25, 50, 100):
        scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(steps)
        assert np.abs(scheduler.timesteps.numpy() - sampling_schedule('dpm++', steps).timestep_map[:0:-1]).max() <= 1


def test_fewer_steps_than_ddim_come_closer_to_the_exact_path(x64):
    """A thousand steps of DDIM stand for the exact solution, which both approach; doubling the steps quarters the error."""
    x_T = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)))
    exact = sample_ddim(toy_model, x_T, {}, schedule=make_schedule(1000))

    def error(sampler, method, steps):
        return relative_error(sampler(toy_model, x_T, {}, schedule=sampling_schedule(method, steps)), exact)

    assert error(sample_dpm, 'dpm++', 10) < error(sample_ddim, 'ddim', 20)
    assert error(sample_dpm, 'dpm++', 40) < 0.5 * error(sample_dpm, 'dpm++', 10)


def test_a_perfect_prediction_is_reached_in_any_number_of_steps():
    """A model that knows the picture: every step moves along the straight line of DDIM, the last one lands on it."""
    picture = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 4, 3)), jnp.float32)
    alphas = jnp.asarray(make_schedule(1000).alphas_cumprod, jnp.float32)

    def model(x, t, cond):
        level = alphas[t][:, None, None, None]
        return jnp.concatenate([(x - jnp.sqrt(level) * picture) / jnp.sqrt(1 - level), jnp.zeros_like(x)], -1)

    x_T = jax.random.normal(jax.random.key(0), picture.shape)
    for steps in (1, 2, 7):
        got = sample_dpm(model, x_T, {}, schedule=sampling_schedule('dpm++', steps))
        np.testing.assert_allclose(got, picture, atol=2e-3)      # the first prediction divides by 0.006


def test_the_first_and_the_last_step_are_of_first_order():
    table = solver_coefficients([0.1, 0.5, 0.9, 1.0], [0.995, 0.87, 0.44, 0.0])
    assert table.shape == (3, 3) and table[0, 2] == table[2, 2] == 0 and table[1, 2] > 0
    np.testing.assert_array_equal(table[2, :2], [0, 1])       # to the predicted picture itself
