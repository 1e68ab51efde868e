"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper: model function in, model function out."""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array


def guide(model_fn: Callable, cfg_scale: float, pair: Callable, channels: int | str = 3,
          interval: tuple[float, float] | None = None) -> Callable:
    """ε = ε_null + s·(ε_cond - ε_null), with both predictions from one call on a doubled batch.

    Args:
        model_fn: (x_BHWC, t_B, cond) -> [B, H, W, 2C].
        cfg_scale: s, a plain number. At 1 guidance changes nothing, so `model_fn` itself is returned: half
            the work.
        pair: cond -> (cond, unconditional cond), dicts of arrays [B, ...] with the same keys
            (`Network.guidance_pair`).
        channels: how many of the noise channels are guided; all, where a model has fewer. 3, although latents
            have 4, is what DiT does and what its published figures were made with; 'all' is the textbook
            form. The other noise channels and the variance are those of the condition.
        interval: (low, high), timesteps: guided where low <= t <= high only (Kynkäänniemi et al. 2024, there
            in σ); outside the output is the model's own, and where that holds for the whole batch the work is
            half.

    The guided output is float32, or wider if the model's is.
    """
    check_guidance(cfg_scale, channels)
    if cfg_scale == 1:
        return model_fn

    def everywhere(x_BHWC, t_B, cond):
        guided = x_BHWC.shape[-1] if channels == 'all' else min(channels, x_BHWC.shape[-1])
        given, null = pair(cond)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x_BHWC, t_B, given), (x_BHWC, t_B, null))
        output = model_fn(*both)
        # The difference of two near-equal bfloat16 numbers, times s, would carry their rounding into the
        # noise.
        conditional, without = jnp.split(output.astype(accumulator(output)), 2)
        scale = cfg_scale if interval is None else jnp.where(_inside(t_B, interval), cfg_scale,
                                                             1)[:, None, None, None]
        noise = without[..., :guided] + scale * (conditional[..., :guided] - without[..., :guided])
        return jnp.concatenate([noise, conditional[..., guided:]], axis=-1)

    def somewhere(x_BHWC, t_B, cond):
        def plain(*args):
            output = model_fn(*args)
            return output.astype(accumulator(output))

        return jax.lax.cond(_inside(t_B, interval).any(), everywhere, plain, x_BHWC, t_B, cond)

    return everywhere if interval is None else somewhere


def _inside(t_B: Array, interval: tuple[float, float]) -> Array:
    low, high = interval
    return (t_B >= low) & (t_B <= high)


def check_guidance(cfg_scale: float, channels: int | str) -> None:
    """Raises UserError for a scale or channels that make no sense."""
    if not math.isfinite(cfg_scale):
        raise UserError(f'the guidance scale must be a number, got {cfg_scale}; 1 means none')
    if channels != 'all' and not (isinstance(channels, int) and channels > 0):
        raise UserError(f"guided channels must be a number above 0 or 'all', got {channels!r}")


def guided_timesteps(interval: tuple[float, float], train_steps: int) -> tuple[float, float] | None:
    """(low, high) as fractions of the schedule, 0 the image and 1 the noise, as timesteps; None for all of
    it."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(f'the guidance interval is two fractions of the schedule with 0 <= low < high <= 1 '
                        f'(0: the image, 1: pure noise), got {low:g} and {high:g}')
    return None if (low, high) == (0, 1) else (low * (train_steps - 1), high * (train_steps - 1))
