"""From noise to images: every sampler is one `lax.scan` over the steps of a schedule, all with one signature.

    sample(model_fn, x_T, cond, *, schedule, key=None, noise=None, eta=0.0, clip_denoised=False,
    trajectory=False)

    ddpm    ancestral, with the learned variance        ddim    deterministic, or with noise (eta)
    dpm++   DPM-Solver++(2M) as diffusers has it         dpm++original   as the solver's and PixArt's own code
            has it (both in `lit_jax.diffusion.dpm_solver`)

Args:
    model_fn: (x_BHWC, t_B, cond) -> [B, H, W, 2C]; t_B int32 holds original timesteps, or floating ones
        between them where the schedule has such levels (dpm++original). See `guidance.guide`.
    x_T: [B, H, W, C] standard normal noise. The state is kept in its dtype, at least float32.
    cond: dict of arrays with a leading axis B, e.g. {'label': y_B}.
    schedule: respaced to the steps to take (`sampling_schedule`).
    key, noise: where the noise of each step comes from, one of the two: random keys [B], one an image (step i
        folds i into it), so that an image's noise does not depend on its company; or [steps, B, H, W, C] in
        the order of the steps, the noisiest first (the last entry has no effect). One key for all is spread:
        image b folds b into it. DDIM with eta 0 and both dpm++ need neither.
    eta: DDIM only, a plain number from 0 (deterministic) to 1 (the variance of the posterior). The others
        ignore it.
    clip_denoised: hold the predicted x0 in [-1, 1] at every step; for pixels, not for latents.
    trajectory: return the state after each step.

Returns:
    x_0 [B, H, W, C], or [steps, B, H, W, C] with `trajectory`; entry [-1] is then x_0.
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
    """One ancestral step: mean + σ·noise with the learned variance; no noise at t = 0."""
    std = look_up(np.arange(schedule.num_steps) > 0, t_B, x_t) * jnp.exp(0.5 * prediction.log_variance)
    return prediction.mean + std * noise


def ddim_step(schedule: Schedule, prediction: Prediction, x_t: Array, t_B: Array, noise: Array,
              eta: float = 0.0) -> Array:
    """One DDIM step (Song et al. 2021, eq. 12): towards x0, back along the implied noise, and σ(eta)·noise on
    top."""
    now, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    # In float64 here, not on the device: the difference under the root must not turn negative. σ is 0 at t =
    # 0.
    sigma = eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
    along = np.sqrt(np.maximum(1 - before - sigma ** 2, 0.0))
    direction = predict_noise(schedule, x_t, t_B, prediction.x0)   # after clipping, where x0 was clipped
    x = look_up(np.sqrt(before), t_B, x_t) * prediction.x0 + look_up(along, t_B, x_t) * direction
    return x + look_up(sigma, t_B, x_t) * noise if eta else x


def ddim_reverse_step(schedule: Schedule, prediction: Prediction, x_t: Array, t_B: Array) -> Array:
    """x_{t+1} from x_t along the deterministic DDIM path: from an image to the noise that gives it."""
    after = schedule.alphas_cumprod_next
    return (look_up(np.sqrt(after), t_B, x_t) * prediction.x0
            + look_up(np.sqrt(1 - after), t_B, x_t) * predict_noise(schedule, x_t, t_B, prediction.x0))


def sample_ddpm(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
                key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """Ancestral sampling (DDPM, algorithm 2) with the learned variance. Arguments: see the module; `eta` is
    ignored."""
    draw, xs = _noise_source(schedule, x_T, key, noise, needed=True)
    return _scan(ddpm_step, model_fn, x_T, cond, schedule, draw, xs, clip_denoised, trajectory)


def sample_ddim(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
                key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """DDIM (Song et al. 2021), deterministic at eta 0. Arguments: see the module. The learned variance is not
    used."""
    if not 0 <= eta <= 1:
        raise UserError(f'eta must lie between 0 (no noise) and 1 (as much as ddpm), got {eta}')
    draw, xs = _noise_source(schedule, x_T, key, noise, needed=eta > 0)

    def step(*args):
        return ddim_step(*args, eta=eta)

    return _scan(step, model_fn, x_T, cond, schedule, draw, xs, clip_denoised, trajectory)


SAMPLERS = {'ddpm': sample_ddpm, 'ddim': sample_ddim, 'dpm++': sample_dpm,
            'dpm++original': sample_dpm_original}


def sampling_schedule(method: str, steps: int, train_steps: int = 1000, kind: str = 'linear') -> Schedule:
    """The schedule with which a sampler evaluates the model `steps` times, spread evenly as DiT spreads them
    (dpm++original: as its own code spreads them, between timesteps where they fall so).

    Raises UserError for a method that is not known, or steps that the schedule does not have.
    """
    check_known('sampler', method, SAMPLERS)
    if steps < 1:
        raise UserError(f'sampling takes at least 1 step, got {steps}')
    if method == 'dpm++original':
        return spread_levels(train_steps, steps + 1, kind)
    # n steps of dpm++ lead through n + 1 levels, so it cannot take all of them.
    return make_schedule(train_steps, respacing=str(steps + (method == 'dpm++')), kind=kind)


def _noise_source(schedule: Schedule, x_T: Array, key: Array | None, noise: Array | None,
                  needed: bool) -> tuple[Callable, Array]:
    """(draw, xs): draw(xs[i]) is the noise of the i-th step, or 0 where none is needed."""
    if not needed:
        return lambda _: 0.0, jnp.arange(schedule.num_steps)
    if (key is None) == (noise is None):
        raise UserError('this sampler draws noise at every step: give it one of key (random keys) and noise '
                        f'(an array), got {"neither" if key is None else "both"}')
    if noise is not None:
        if noise.shape != (expected := (schedule.num_steps, *x_T.shape)):
            raise UserError(f'noise has shape {noise.shape}, expected {expected}: one entry for each step')
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
