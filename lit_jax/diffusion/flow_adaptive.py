"""Dormand-Prince 5(4) for flows, with steps of its own for each image, so that no image depends on others."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from lit_jax.diffusion.flow import Flow

Array = jax.Array
# Dormand & Prince 1980: times and weights of the stages; the last row is the fifth-order result.
_TIMES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
_STAGES = np.array([
    [0, 0, 0, 0, 0, 0, 0],
    [1 / 5, 0, 0, 0, 0, 0, 0],
    [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
    [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0]])
_FOURTH = np.array([5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40])
ABSOLUTE = 1e-3           # the absolute tolerance over the relative one (SiT: 1e-6 and 1e-3)
FIRST, SAFETY, LEAST, MOST = 0.05, 0.9, 0.2, 10.0      # first step; bounds of the growth of a step


@dataclass(frozen=True)
class AdaptiveSchedule:
    """start, end: times. most: steps, of six evaluations, that an image may try; the last goes to the end."""
    flow: 'Flow'
    start: float
    end: float
    most: int
    tolerance: float

    @property
    def num_steps(self) -> int:
        return self.most


def sample_dopri5(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: AdaptiveSchedule,
                  key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                  trajectory: bool = False) -> Array:
    """The ODE dx = v·dt, each step with an error of at most `tolerance` relative to the image's values. The
    arguments are those of `samplers`; key, noise and eta are ignored, and there is no trajectory."""
    if trajectory:
        raise UserError('dopri5 has no trajectory: each image has steps of its own')
    flow, dtype, images = schedule.flow, accumulator(x_T), x_T.shape[:1] + (1,) * (x_T.ndim - 1)
    stages, times, fourth = (jnp.asarray(table, dtype) for table in (_STAGES, _TIMES, _FOURTH))
    size = schedule.end - schedule.start

    def velocity(x, t_B):
        time_B = flow.model_time(t_B)
        return flow.convert(model_fn(x, time_B, cond).astype(dtype), x, time_B, 'velocity')

    def step(state):
        """A first step of size 0 finds the slope at the start; each other one inherits it from the last."""
        count, x, t_B, h_B, slope = state
        left_B = schedule.end - t_B
        h_B = jnp.where(count == schedule.most, left_B, jnp.minimum(h_B, left_B))
        h = h_B.reshape(images)

        def stage(slopes, row):
            weights, time, number = row
            inner = x + h * jnp.tensordot(weights, slopes, 1)
            return slopes.at[number].set(velocity(inner, t_B + time * h_B)), inner

        slopes = jnp.zeros((7, *x.shape), dtype).at[0].set(slope)
        slopes, inner = jax.lax.scan(stage, slopes, (stages[1:], times[1:], jnp.arange(1, 7)))
        result = inner[-1]
        error = h * jnp.tensordot(stages[6] - fourth, slopes, 1)
        scale = schedule.tolerance * (ABSOLUTE + jnp.maximum(jnp.abs(x), jnp.abs(result)))
        wrong_B = jnp.sqrt(jnp.square(error / scale).mean(tuple(range(1, x.ndim))))
        taken_B = (wrong_B <= 1) | (count == schedule.most)
        growth_B = jnp.clip(SAFETY * jnp.maximum(wrong_B, 1e-10) ** -0.2, LEAST, MOST)
        next_B = jnp.where(count == 0, FIRST * size, h_B * growth_B)
        running_B = left_B > 0
        moved = (taken_B & running_B).reshape(images)
        t_B = jnp.where(taken_B & running_B, jnp.where(h_B >= left_B, schedule.end, t_B + h_B), t_B)
        return (count + 1, jnp.where(moved, result, x), t_B, next_B, jnp.where(moved, slopes[6], slope))

    def unfinished(state):
        count, _, t_B, _, _ = state
        return (count <= schedule.most) & (t_B < schedule.end).any()

    x_T = x_T.astype(dtype)
    start_B = jnp.full(x_T.shape[:1], schedule.start, dtype)
    state = jnp.int32(0), x_T, start_B, jnp.zeros_like(start_B), jnp.zeros_like(x_T)
    return jax.lax.while_loop(unfinished, step, state)[1]
