"""Interprets model outputs, and computes DiT's training loss: noise error plus a variational bound.

The model predicts the noise ε in the first C channels. The other C, v, place the log-variance of a step
between those of the posterior and of β (improved DDPM, §3.1). A model without them (learn_sigma=False) is
trained by the noise error alone, and has the variance β in every step, as in DiT's code. `t_B` is an index
into the schedule's tables: the original timestep, unless the schedule is respaced. The dtype is float32, or
float64 if an input is.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.schedule import Schedule, look_up
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) and the predicted image, each [B, H, W, C]."""
    mean: Array
    variance: Array
    log_variance: Array
    x0: Array


def split_output(output: Array, channels: int) -> tuple[Array, Array | None]:
    """[B, H, W, 2C] -> (noise, raw variance), each [B, H, W, C]; [B, H, W, C] -> (noise, None)."""
    if output.shape[-1] not in (channels, 2 * channels):
        raise UserError(f'the model outputs {output.shape[-1]} channels for inputs of {channels}; expected '
                        f'{channels} (noise) or {2 * channels} (noise and variance)')
    return output[..., :channels], output[..., channels:] if output.shape[-1] > channels else None


def q_sample(schedule: Schedule, x0: Array, t_B: Array, noise: Array) -> Array:
    """x_t = √ᾱ_t·x0 + √(1 - ᾱ_t)·noise, the forward process."""
    return (look_up(schedule.sqrt_alphas_cumprod, t_B, x0) * x0
            + look_up(schedule.sqrt_one_minus_alphas_cumprod, t_B, x0) * noise)


def predict_x0(schedule: Schedule, x_t: Array, t_B: Array, noise: Array) -> Array:
    """The x0 that gives x_t with this noise: x_t/√ᾱ - noise·√(1/ᾱ - 1)."""
    return (look_up(schedule.sqrt_recip_alphas_cumprod, t_B, x_t) * x_t
            - look_up(schedule.sqrt_recipm1_alphas_cumprod, t_B, x_t) * noise)


def predict_noise(schedule: Schedule, x_t: Array, t_B: Array, x0: Array) -> Array:
    """The noise that gives x_t from x0, the inverse of `predict_x0`."""
    return ((look_up(schedule.sqrt_recip_alphas_cumprod, t_B, x_t) * x_t - x0)
            / look_up(schedule.sqrt_recipm1_alphas_cumprod, t_B, x_t))


def posterior_mean(schedule: Schedule, x0: Array, x_t: Array, t_B: Array) -> Array:
    """Mean of q(x_{t-1} | x_t, x0)."""
    return (look_up(schedule.posterior_mean_coef1, t_B, x_t) * x0
            + look_up(schedule.posterior_mean_coef2, t_B, x_t) * x_t)


def learned_log_variance(schedule: Schedule, variance_raw: Array, t_B: Array) -> Array:
    """Linear in v, which is not bounded: the log-variance of the posterior at v = -1, and of β at v = 1."""
    fraction = (variance_raw.astype(accumulator(variance_raw)) + 1) / 2
    return (fraction * look_up(schedule.log_betas, t_B, variance_raw)
            + (1 - fraction) * look_up(schedule.posterior_log_variance, t_B, variance_raw))


def fixed_log_variance(schedule: Schedule, t_B: Array, like: Array) -> Array:
    """That of β, and of the posterior in the last step, where β would add noise to the image."""
    table = np.append(schedule.posterior_log_variance[:1], schedule.log_betas[1:])
    return jnp.broadcast_to(look_up(table, t_B, like), like.shape)


def p_mean_variance(schedule: Schedule, output: Array, x_t: Array, t_B: Array,
                    clip_denoised: bool = False) -> Prediction:
    """The model's step from x_t [B, H, W, C], given its output [B, H, W, 2C], or C channels without variance.

    clip_denoised: clip x0 to [-1, 1], for pixels; latents are not bounded."""
    dtype = accumulator(output, x_t)
    noise, variance_raw = split_output(output.astype(dtype), x_t.shape[-1])
    x_t = x_t.astype(dtype)
    x0 = predict_x0(schedule, x_t, t_B, noise)
    if clip_denoised:
        x0 = x0.clip(-1, 1)
    log_variance = fixed_log_variance(schedule, t_B, x_t) if variance_raw is None else \
        learned_log_variance(schedule, variance_raw, t_B)
    return Prediction(posterior_mean(schedule, x0, x_t, t_B), jnp.exp(log_variance), log_variance, x0)


def training_losses(schedule: Schedule, output: Array, x0: Array, x_t: Array, t_B: Array,
                    noise: Array) -> dict[str, Array]:
    """{'mse', 'vb'}, each [B], averaged over pixels and channels; DiT minimises their sum. Without a variance
    in the output {'mse'}.

    mse = (noise - ε)². vb is one term of the variational bound, in bits per dimension: the KL divergence from
    the posterior, or at t = 0 the negative log-likelihood of x0. It trains only v: ε gets no gradient."""
    dtype = accumulator(output, x0, x_t, noise)
    output, x0, x_t, noise = (array.astype(dtype) for array in (output, x0, x_t, noise))
    predicted, variance_raw = split_output(output, x0.shape[-1])
    mse = _mean_BHWC(jnp.square(noise - predicted))
    if variance_raw is None:
        return {'mse': mse}
    frozen = jnp.concatenate([jax.lax.stop_gradient(predicted), variance_raw], axis=-1)
    model = p_mean_variance(schedule, frozen, x_t, t_B)
    kl = normal_kl(posterior_mean(schedule, x0, x_t, t_B), look_up(schedule.posterior_log_variance, t_B, x_t),
                   model.mean, model.log_variance)
    nll = -discretized_log_likelihood(x0, model.mean, 0.5 * model.log_variance)
    return {'mse': mse,
            'vb': jnp.where(t_B == 0, _mean_BHWC(nll), _mean_BHWC(kl)) / math.log(2)}


def normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N1 ‖ N2) in nats, element by element."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + jnp.exp(log_variance1 - log_variance2)
                  + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def discretized_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """log P(x) in nats, for x in [-1, 1] as one of 256 levels of ±1/255; the outer two include the tails.

    The normal CDF is the tanh approximation of Page (1977), to reproduce the values of DDPM's code."""
    inverse_std = jnp.exp(-log_scale)
    below_upper = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    below_lower = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    probability = jnp.where(x < -0.999, below_upper,
                            jnp.where(x > 0.999, 1 - below_lower, below_upper - below_lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def _mean_BHWC(x: Array) -> Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def per_quarter(values_B: Array, t_B: Array, num_steps: int) -> tuple[Array, Array]:
    """(sums [4], counts [4]) of the values in each quarter of the timesteps, the least noisy first.

    Unlike means, these add up over micro-batches, steps and hosts. In the dtype of the values, at least
    float32."""
    values = values_B.astype(accumulator(values_B))
    member = (t_B * 4 // num_steps)[:, None] == jnp.arange(4)
    # `where` instead of a product: a NaN stays in its quarter.
    return jnp.where(member, values[:, None], 0).sum(axis=0), member.sum(axis=0, dtype=values.dtype)
