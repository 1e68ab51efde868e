"""Hybrid knowledge distillation (LiT §3.4): the student follows the teacher's noise and, separately, its
variance.

    L = L_simple + λ1·mean((ε_T - ε_S)²) + λ2·mean((v_T - v_S)²)

L_simple is DiT's own objective, mse + vb. The paper's Σ is read as the raw variance channels v: squared
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


def distillation_losses(student_output: Array, teacher_output: Array) -> dict[str, Array]:
    """{'distill_noise', 'distill_variance'}, each [B], float32 or wider: mean squared differences of the two
    outputs [B, H, W, 2C].

    Both must come from the same x_t, t and (dropped) labels. No gradient reaches the teacher's output.
    """
    if student_output.shape != teacher_output.shape:
        raise UserError(f'the teacher gives {teacher_output.shape}, the student {student_output.shape}: '
                        f'distillation needs the same image size and channels in both; choose a teacher of '
                        f'the same resolution')
    dtype = accumulator(student_output, teacher_output)
    difference = jnp.square(student_output.astype(dtype)
                            - jax.lax.stop_gradient(teacher_output).astype(dtype))
    noise, variance = split_output(difference, student_output.shape[-1] // 2)
    axes = tuple(range(1, difference.ndim))
    return {'distill_noise': noise.mean(axis=axes), 'distill_variance': variance.mean(axis=axes)}


def total_loss(parts: Mapping[str, Array], lambda_noise: float, lambda_variance: float) -> Array:
    """mse + vb + λ1·distill_noise + λ2·distill_variance, of `training_losses` and `distillation_losses`
    merged.

    Parts may be [B] or means. Without a teacher, its two terms are absent.
    """
    weights = {'mse': 1.0, 'vb': 1.0, 'distill_noise': lambda_noise, 'distill_variance': lambda_variance}
    total: Any = sum(weights[name] * value for name, value in parts.items())
    return total
