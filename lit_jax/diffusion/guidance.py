"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper of a model function."""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

Array = jax.Array


def guide(model_fn: Callable, cfg_scale: float, pair: Callable, channels: int | str = 3,
          interval: tuple[float, float] | None = None, one_time: bool = True) -> Callable:
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
        one_time: whether all images of a batch have one time. If not, the work is never half, so that the
            rounding of an image does not depend on its neighbours.

    The guided output is float32, or wider if the model's is. With an interval the function has an attribute
    `guided_at`: (t_B) -> the function whose guidance is decided at other times than the model's (REPA's Heun
    decides at the start of a step).
    """
    check_guidance(cfg_scale, channels)
    if cfg_scale == 1:
        return model_fn

    def everywhere(x_BHWC, t_B, cond, decided_B=None):
        guided = x_BHWC.shape[-1] if channels == 'all' else min(channels, x_BHWC.shape[-1])
        given, null = pair(cond)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x_BHWC, t_B, given), (x_BHWC, t_B, null))
        output = model_fn(*both)
        # In bfloat16, the difference of two near-equal numbers would be mostly rounding error.
        conditional, without = jnp.split(output.astype(accumulator(output)), 2)
        given, null = conditional[..., :guided], without[..., :guided]
        noise = null + cfg_scale * (given - null)
        if interval is not None:
            inside_B = _inside(t_B if decided_B is None else decided_B, interval)
            noise = jnp.where(inside_B[:, None, None, None], noise, given)
        return jnp.concatenate([noise, conditional[..., guided:]], axis=-1)

    def somewhere(x_BHWC, t_B, cond, decided_B=None):
        def plain(x_BHWC, t_B, cond, _):
            output = model_fn(x_BHWC, t_B, cond)
            return output.astype(accumulator(output))

        decided_B = t_B if decided_B is None else decided_B
        inputs = x_BHWC, t_B, cond, decided_B
        return jax.lax.cond(_inside(decided_B, interval).any(), everywhere, plain, *inputs)

    if interval is None or not one_time:
        return everywhere
    return _Guided(somewhere)


class _Guided:
    """A guided model function; `guided_at`: see `guide`."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, x_BHWC: Array, t_B: Array, cond) -> Array:
        return self._function(x_BHWC, t_B, cond)

    def guided_at(self, decided_B: Array) -> Callable:
        return functools.partial(self._function, decided_B=decided_B)


def _inside(t_B: Array, interval: tuple[float, float]) -> Array:
    low, high = interval
    return (t_B >= low) & (t_B <= high)


def check_guidance(cfg_scale: float, channels: int | str) -> None:
    """Raises UserError for an invalid scale or number of channels."""
    if not math.isfinite(cfg_scale):
        raise UserError(f'the guidance scale must be a finite number (1: no guidance), got {cfg_scale}')
    if channels != 'all' and not (isinstance(channels, int) and channels > 0):
        raise UserError(f"guided channels must be a number above 0 or 'all', got {shown(channels)}")


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """(low, high). Raises UserError for an interval that is none."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise UserError(f'the guidance interval must be two fractions of the schedule with 0 <= low < high '
                        f'<= 1 (0: image, 1: noise), got {low:g} and {high:g}')
    return low, high


def guided_timesteps(interval: tuple[float, float], train_steps: int) -> tuple[float, float] | None:
    """The timesteps of (low, high), fractions of the schedule from 0, image, to 1, noise; None for (0, 1)."""
    low, high = check_interval(interval)
    return None if (low, high) == (0, 1) else (low * (train_steps - 1), high * (train_steps - 1))
