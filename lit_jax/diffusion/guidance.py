"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper of a model function."""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

Array = jax.Array


def guide(model_fn: Callable, cfg_scale: float, pair: Callable, channels: int | str = 3,
          interval: tuple[float, float] | None = None) -> Callable:
    """ε = ε_null + s·(ε_cond - ε_null), with both predictions from one call on a doubled batch.

    Args:
        model_fn: (x_BHWC, t_B, cond) -> [B, H, W, 2C].
        cfg_scale: s, a plain number. 1 changes nothing, so `model_fn` itself is returned: half the work.
        pair: cond -> (cond, unconditional cond), dicts of arrays [B, ...] with the same keys
            (`Network.guidance_pair`).
        channels: the number of noise channels that are guided, or 'all', the textbook form. DiT guides 3 of
            the 4 latent channels, also for its published figures. The other noise channels and the variance
            come from the conditional output.
        interval: (low, high): only timesteps low <= t <= high are guided (Kynkäänniemi et al. 2024, there in
            σ). If no image of a batch is guided, the work is half.

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
        # In bfloat16, the difference of two near-equal numbers would be mostly rounding error.
        conditional, without = jnp.split(output.astype(accumulator(output)), 2)
        scale = cfg_scale
        if interval is not None:
            scale = jnp.where(_inside(t_B, interval), cfg_scale, 1)[:, None, None, None]
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
    """Raises UserError for an invalid scale or number of channels."""
    if not math.isfinite(cfg_scale):
        raise UserError(f'the guidance scale must be a finite number (1: no guidance), got {cfg_scale}')
    if channels != 'all' and not (isinstance(channels, int) and channels > 0):
        raise UserError(f"guided channels must be a number above 0 or 'all', got {shown(channels)}")


def guided_timesteps(interval: tuple[float, float], train_steps: int) -> tuple[float, float] | None:
    """The timesteps of (low, high), fractions of the schedule from 0, image, to 1, noise; None for (0, 1)."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(f'the guidance interval must be two fractions of the schedule with 0 <= low < high '
                        f'<= 1 (0: image, 1: noise), got {low:g} and {high:g}')
    return None if (low, high) == (0, 1) else (low * (train_steps - 1), high * (train_steps - 1))
