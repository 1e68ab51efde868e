"""Hybrid knowledge distillation (LiT §3.4), from the teacher's noise and, separately, its variance.

    L = L_simple + λ1·mean((ε_T - ε_S)²) + λ2·mean((v_T - v_S)²)

L_simple is DiT's objective, mse + vb. We take the paper's Σ to be the raw variance channels v: squared
differences of the variances themselves are below 4e-4, too small for the paper's λ2 = 0.05 to matter.
"""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.diffusion.objective import split_output
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array


def distillation_losses(student_output: Array, teacher_output: Array,
                        channels: int | None = None) -> dict[str, Array]:
    """{'distill_noise', 'distill_variance'}: mean squared differences [B], float32 or wider.

    channels: C, if the outputs may be [B, H, W, C]: then there is no 'distill_variance'. Both must come from
    the same x_t, t and (dropped) labels. The teacher's gets no gradient."""
    if student_output.shape != teacher_output.shape:
        raise UserError(f'the teacher outputs {teacher_output.shape}, the student {student_output.shape}; '
                        f'give a teacher with the same image size and channels')
    dtype = accumulator(student_output, teacher_output)
    teacher_output = jax.lax.stop_gradient(teacher_output)
    difference = jnp.square(student_output.astype(dtype) - teacher_output.astype(dtype))
    noise, variance = split_output(difference, channels or student_output.shape[-1] // 2)
    axes = tuple(range(1, difference.ndim))
    losses = {'distill_noise': noise} | ({} if variance is None else {'distill_variance': variance})
    return {name: values.mean(axis=axes) for name, values in losses.items()}


def total_loss(parts: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """The weighted sum of the terms in `parts`, each [B] or a mean."""
    total: Any = sum(weights[name] * value for name, value in parts.items())
    return total
