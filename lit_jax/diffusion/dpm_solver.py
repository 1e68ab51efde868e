"""DPM-Solver++(2M), a deterministic second-order sampler for 10 to 50 steps.

Lu et al. 2022, arXiv 2211.01095, algorithm 2. n + 1 noise levels of a schedule make n steps, of which the
first and the last are of first order. The model is evaluated at all levels but the lowest. Variants:

    dpm++            evenly spaced whole timesteps; the last step goes from the lowest level to no noise.
                     diffusers' DPMSolverMultistepScheduler with its defaults (`linspace` timesteps, midpoint,
                     final sigma 0).
    dpm++original    evenly spaced levels, most between two timesteps, with interpolated log α
                     (`spread_levels`); the last step ends at the lowest level, whose noise (σ 0.01) stays.
                     The authors' code with PixArt's settings (`time_uniform`, no denoising to zero).
"""
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.objective import predict_x0, split_output
from lit_jax.diffusion.schedule import Schedule
from lit_jax.runtime.dtypes import accumulator

Array = jax.Array


def solver_coefficients(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """a, b, c [n, 3], float64, of the n steps x' = a·x + b·(x0 + c·(x0 - x0_before)) through n + 1 levels.

    alpha, sigma: x = alpha·x0 + sigma·noise at each level, the noisiest first. The last sigma may be 0.

    With λ = log(alpha/sigma) and h its growth in a step: a = σ'/σ, b = α'·(1 - e^-h), c = h / (2·h_before).
    The first and the last step are of first order: c = 0."""
    alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - a * alpha[:-1]     # α'·(1 - e^-h) without a logarithm of sigma 0
    growth = np.diff(np.log(alpha[:-1] / sigma[:-1]))
    c = np.zeros_like(a)
    c[1:-1] = growth[1:] / (2 * growth[:-1])
    return np.stack([a, b, c], axis=1)


def sample_dpm(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
               key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
               clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """The variant of diffusers, one step fewer than the schedule has. Arguments: see `samplers`.

    It draws no noise, so key, noise and eta are ignored. The learned variance is not used."""
    kept = schedule.alphas_cumprod[:0:-1]                     # from the noisiest down, without the lowest
    alpha, sigma = np.append(np.sqrt(kept), 1.0), np.append(np.sqrt(1 - kept), 0.0)
    return _solve(model_fn, x_T, cond, schedule, solver_coefficients(alpha, sigma), clip_denoised, trajectory)


def sample_dpm_original(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: Schedule,
                        key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                        clip_denoised: bool = False, trajectory: bool = False) -> Array:
    """The variant of the original code: as `sample_dpm`, but it ends at the lowest level of the schedule.

    With the schedule of `sampling_schedule` the model gets fractional timesteps, in the state's dtype."""
    levels = schedule.alphas_cumprod[::-1]
    table = solver_coefficients(np.sqrt(levels), np.sqrt(1 - levels))
    return _solve(model_fn, x_T, cond, schedule, table, clip_denoised, trajectory)


def _solve(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], schedule: Schedule, table: np.ndarray,
           clip_denoised: bool, trajectory: bool) -> Array:
    """Steps with these coefficients [n, 3], from the noisiest level down."""
    dtype, batch = accumulator(x_T), x_T.shape[:1]

    def body(carry, inputs):
        x, x0_before = carry
        index, timestep, (a, b, c) = inputs
        output = model_fn(x, jnp.broadcast_to(timestep, batch), cond).astype(dtype)
        x0 = predict_x0(schedule, x, jnp.broadcast_to(index, batch), split_output(output, x.shape[-1])[0])
        if clip_denoised:
            x0 = x0.clip(-1, 1)
        x = a * x + b * (x0 + c * (x0 - x0_before))
        return (x, x0), x if trajectory else None

    indices = jnp.arange(schedule.num_steps - 1, 0, -1, dtype=jnp.int32)
    timesteps = schedule.timestep_map[:0:-1]
    if timesteps.dtype != np.int32:
        timesteps = timesteps.astype(dtype)
    x_T = x_T.astype(dtype)
    inputs = indices, timesteps, jnp.asarray(table, dtype)
    (x_0, _), states = jax.lax.scan(body, (x_T, jnp.zeros_like(x_T)), inputs)
    return states if trajectory else x_0
