"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper: model function in, model function out."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lit_jax.diffusion.schedule import accumulator
from lit_jax.errors import UserError


def guide(model_fn: Callable, cfg_scale: float, null_label: int, channels: int | str = 3) -> Callable:
    """ε = ε_null + s·(ε_label - ε_null), with both predictions from one call on a doubled batch.

    Args:
        model_fn: (x_BHWC, t_B, cond) -> [B, H, W, 2C], `cond['label']` int [B].
        cfg_scale: s, a plain number. At 1 guidance changes nothing, so `model_fn` itself is returned: half the work.
        null_label: the label that stands for "no class".
        channels: how many of the noise channels are guided; all, where a model has fewer. 3, although latents have 4,
            is what DiT does and what its published figures were made with; 'all' is the textbook form.
            The other noise channels and the variance are those of the label.

    The guided output is float32, or wider if the model's is.
    """
    if channels != 'all' and not (isinstance(channels, int) and channels > 0):
        raise UserError(f"guided channels must be a number above 0 or 'all', got {channels!r}")
    if cfg_scale == 1:
        return model_fn

    def guided_fn(x_BHWC, t_B, cond):
        guided = x_BHWC.shape[-1] if channels == 'all' else min(channels, x_BHWC.shape[-1])
        null = {**cond, 'label': jnp.full_like(cond['label'], null_label)}
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x_BHWC, t_B, cond), (x_BHWC, t_B, null))
        output = model_fn(*both)
        # The difference of two near-equal bfloat16 numbers, times s, would carry their rounding into the noise.
        with_label, without = jnp.split(output.astype(accumulator(output)), 2)
        noise = without[..., :guided] + cfg_scale * (with_label[..., :guided] - without[..., :guided])
        return jnp.concatenate([noise, with_label[..., guided:]], axis=-1)

    return guided_fn
