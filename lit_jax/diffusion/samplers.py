"""Samplers, from noise to images: each is a `lax.scan` over the steps of a schedule, with this signature:

    sample(model_fn, x_T, cond, *, schedule, key=None, noise=None, eta=0.0, clip_denoised=False,
           trajectory=False)

    ddpm             ancestral, with the learned variance, or the fixed one of a model without
    ddim             deterministic, or with noise (eta)
    dpm++            DPM-Solver++(2M) as in diffusers (`dpm_solver`)
    dpm++original    DPM-Solver++(2M) as in the authors' code, with PixArt's settings

Args:
    model_fn: (x_BHWC, t_B, cond) -> [B, H, W, 2C], or [B, H, W, C] without a variance; t_B are original
        timesteps, int32, or fractional ones in floating point if the schedule has them (dpm++original). See
        `guidance.guide`.
    x_T: [B, H, W, C] standard normal noise. The state has its dtype, at least float32.
    cond: dict of arrays with a leading axis B, e.g. {'label': y_B}.
    schedule: respaced to the number of steps (`sampling_schedule`).
    key, noise: give one of them, unless the sampler is DDIM with eta 0 or a dpm++. key: random keys [B], so
        that the noise of an image does not depend on the others (step i folds in i), or one key (image b
        folds in b). noise: [steps, B, H, W, C] in the order of the steps; the last entry has no effect.
    eta: of DDIM only, from 0 (deterministic) to 1 (the variance of the posterior).
    clip_denoised: clip the predicted x0 to [-1, 1] at each step; for pixels, not for latents.
    trajectory: return the state after each step.

Returns:
    x_0 [B, H, W, C], or with `trajectory` [steps, B, H, W, C], whose last entry is x_0.
"""
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.dpm_solver import sample_dpm, sample_dpm_original
from lit_jax.diffusion.objective import Prediction, p_mean_variance, predict_noise
from lit_jax.diffusion.schedule import Schedule, look_up, make_schedule, spread_levels
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, check_known

Array = jax.Array
Step = Callable[[Schedule, Prediction, Array, Array, Array], Array]


def ddpm_step(schedule: Schedule, prediction: Prediction, x_t: Array, t_B: Array, noise: Array) -> Array:
    """One ancestral step: mean + σ·noise with the model's variance; no noise at t = 0."""
    std = look_up(np.arange(schedule.num_steps) > 0, t_B, x_t) * jnp.exp(0.5 * prediction.log_variance)
    return prediction.mean + std * noise


def ddim_step(schedule: Schedule, prediction: Prediction, x_t: Array, t_B: Array, noise: Array,
              eta: float = 0.0) -> Array:
    """One DDIM step (Song et al. 2021, eq. 12): to x0, back along the implied noise, plus σ(eta)·noise."""
    now, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    # In float64: the difference under the root must not become negative. σ is 0 at t = 0.
    sigma = eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
    along = np.sqrt(np.maximum(1 - before - sigma ** 2, 0.0))
    direction = predict_noise(schedule, x_t, t_B, prediction.x0)   # after clipping, where x0 was clipped
    x = look_up(np.sqrt(before), t_B, x_t) * prediction.x0 + look_up(along, t_B, x_t) * direction
    return x + look_up(sigma, t_B, x_t) * noise if eta else x


def ddim_reverse_step(schedule: Schedule, prediction: Prediction, x_t: Array, t_B: Array) -> Array:
    """x_{t+1} from x_t: one step of the deterministic DDIM path from an image back to its noise."""
    after = schedule.alphas_cumprod_next
    return (look_up(np.sqrt(after), t_B, x_t) * prediction.x0
            + look_up(np.sqrt(1 - after), t_B, x_t) * predict_noise(schedule, x_t, t_B, prediction.x0))


def sample_ddpm(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
                key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """Ancestral sampling (DDPM, algorithm 2) with the learned variance. Arguments: see the module."""
    draw, xs = noise_source(schedule, x_T, key, noise, needed=True)
    return _scan(ddpm_step, model_fn, x_T, cond, schedule, draw, xs, clip_denoised, trajectory)


def sample_ddim(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
                key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """DDIM (Song et al. 2021); the learned variance is not used. Arguments: see the module."""
    if not 0 <= eta <= 1:
        raise UserError(f'eta must be between 0 (no noise) and 1 (as much as ddpm), got {eta}')
    draw, xs = noise_source(schedule, x_T, key, noise, needed=eta > 0)

    def step(*args):
        return ddim_step(*args, eta=eta)

    return _scan(step, model_fn, x_T, cond, schedule, draw, xs, clip_denoised, trajectory)


SAMPLERS = {'ddpm': sample_ddpm, 'ddim': sample_ddim, 'dpm++': sample_dpm,
            'dpm++original': sample_dpm_original}


def sampling_schedule(method: str, steps: int, train_steps: int = 1000, kind: str = 'linear') -> Schedule:
    """The schedule with which a sampler evaluates the model `steps` times, spaced as in DiT, or for
    dpm++original as in its own code. UserError for an unknown method, or more steps than the schedule has."""
    check_known('sampler', method, SAMPLERS)
    if steps < 1:
        raise UserError(f'sampling takes at least 1 step, got {steps}')
    if method == 'dpm++original':
        return spread_levels(train_steps, steps + 1, kind)
    # n steps of dpm++ need n + 1 levels.
    return make_schedule(train_steps, respacing=str(steps + (method == 'dpm++')), kind=kind)


def noise_source(schedule, x_T: Array, key: Array | None, noise: Array | None,
                  needed: bool) -> tuple[Callable, Array]:
    """(draw, xs): draw(xs[i]) is the noise of step i, or 0 if none is needed. schedule: has `num_steps`."""
    if not needed:
        return lambda _: 0.0, jnp.arange(schedule.num_steps)
    if (key is None) == (noise is None):
        raise UserError('this sampler needs noise at each step: give one of key (random keys) and noise (an '
                        f'array), got {"neither" if key is None else "both"}')
    if noise is not None:
        if noise.shape != (expected := (schedule.num_steps, *x_T.shape)):
            raise UserError(f'noise has shape {noise.shape}; expected {expected}, one entry for each step')
        return lambda step_noise: step_noise, jnp.asarray(noise, accumulator(x_T))
    assert key is not None
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x_T))) if key.ndim == 0 else key
    if key_B.shape != x_T.shape[:1]:
        raise UserError(f'{len(x_T)} images need {len(x_T)} random keys or one for all, got {key_B.shape}')

    def draw_one(key, i):
        return jax.random.normal(jax.random.fold_in(key, i), x_T.shape[1:], accumulator(x_T))

    return lambda i: jax.vmap(draw_one, (0, None))(key_B, i), jnp.arange(schedule.num_steps)


def _scan(step: Step, model_fn: Callable, x_T: Array, cond: Mapping[str, Array], schedule: Schedule,
          draw: Callable, noise_xs: Array, clip_denoised: bool, trajectory: bool) -> Array:
    """Runs `step` from the noisiest index of the schedule down to 0."""
    dtype, batch = accumulator(x_T), x_T.shape[:1]

    def body(x, inputs):
        index, timestep, noise_x = inputs
        t_B = jnp.broadcast_to(index, batch)
        output = model_fn(x, jnp.broadcast_to(timestep, batch), cond).astype(dtype)
        prediction = p_mean_variance(schedule, output, x, t_B, clip_denoised)
        x = step(schedule, prediction, x, t_B, draw(noise_x))
        return x, x if trajectory else None

    indices = jnp.arange(schedule.num_steps, dtype=jnp.int32)[::-1]
    x_0, states = jax.lax.scan(body, x_T.astype(dtype), (indices, schedule.timestep_map[::-1], noise_xs))
    return states if trajectory else x_0
