"""Samplers of flows, from noise to data, with the signature of `samplers`; `schedule` is of `flow_schedule`.

    euler       the ODE dx = v·dt, evenly spaced or shifted times (SiT, REPA, LightningDiT)
    heun        Heun's method, without the corrector in the last step (REPA, EDM); two evaluations a step
    heun2       Heun's method in all steps (torchdiffeq's heun2, SiT)
    sde         Euler-Maruyama on dx = (v + w·s)·dt + √(2w)·dW, then a last step (SiT; REPA: form 'linear')
    sde_heun    the same with Heun's method for the drift; the noise comes first (SiT)
    dpm++       DPM-Solver++(2M) with diffusers' flow sigmas
    dopri5      adaptive, with steps of its own for each image (`flow_adaptive`)

Every evaluation of a fixed-step method is one row of a table: what the method makes of the state, the output
and the noise is linear. So all of them are one scan, whatever the path and the prediction.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.dpm_solver import solver_coefficients
from lit_jax.diffusion.flow_adaptive import AdaptiveSchedule, sample_dopri5
from lit_jax.diffusion.flow_paths import Coefficients, coefficients, prediction_weights, shifted
from lit_jax.diffusion.samplers import noise_source
from lit_jax.diffusion.settings import FLOW_METHODS, SDES, SamplerSettings
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

if TYPE_CHECKING:
    from lit_jax.diffusion.flow import Flow

Array = jax.Array
TABLE = 1000      # timesteps of diffusers' schedulers, which the times of dpm++ are rounded down to

# SiT's forms of the diffusion w(t): (t, coefficients, norm) -> w.
FORMS: Mapping[str, Callable[[np.ndarray, Coefficients, float], np.ndarray]] = {
    'constant': lambda t, c, norm: norm * np.ones_like(t),
    'sbdm': lambda t, c, norm: norm * c.spread,
    'sigma': lambda t, c, norm: norm * c.sigma,
    'linear': lambda t, c, norm: norm * (1 - t),
    'decreasing': lambda t, c, norm: 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
    'increasing_decreasing': lambda t, c, norm: norm * np.sin(np.pi * t) ** 2,
}
LAST_STEPS = 'mean', 'euler', 'tweedie', 'none'


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """Evaluations of the model, numpy float64 [n] each, and how they make steps.

    The state before step i is `base`. An evaluation at x (in a step's first x = base + before·noise, which
    becomes its base) gives k = of_x·x + of_output·output, with which
    x = keep·base + now·k + earlier·(k of the evaluation before) + after·noise.

    time, guided_at: the model's times; of the evaluation, and of the one that decides whether guidance acts.
    ends: whether a step ends here. step: its number."""
    flow: 'Flow'
    time: np.ndarray
    guided_at: np.ndarray
    of_x: np.ndarray
    of_output: np.ndarray
    keep: np.ndarray
    now: np.ndarray
    earlier: np.ndarray
    before: np.ndarray
    after: np.ndarray
    ends: np.ndarray
    step: np.ndarray

    @property
    def num_steps(self) -> int:
        return int(self.step[-1]) + 1

    def rows(self, dtype, whole: bool = False) -> dict[str, Array]:
        """The evaluations as arrays, for `scan_rows`: without the columns that change nothing, unless
        `whole`. What is not in a program is not rounded differently in that of another number of devices."""
        usual = {'of_x': 0, 'of_output': 1, 'keep': 1, 'earlier': 0, 'before': 0, 'after': 0}
        names = [name for name in ('time', 'guided_at', 'now', *usual)
                 if whole or name not in usual or (getattr(self, name) != usual[name]).any()]
        rows = {name: jnp.asarray(getattr(self, name), dtype) for name in names}
        if whole or not self.ends.all():
            rows |= {'ends': jnp.asarray(self.ends), 'first': jnp.asarray(np.append(True, self.ends[:-1]))}
        return rows | {'step': jnp.asarray(self.step, jnp.int32)}

    @property
    def random(self) -> bool:
        return bool(self.before.any() or self.after.any())


def _rows(flow: 'Flow', t: np.ndarray, drift: tuple[np.ndarray, np.ndarray], **given) -> FlowSchedule:
    """A schedule of evaluations at the times t; what is not given is 0 (keep: 1, ends: True)."""
    usual = {name: np.zeros_like(t) for name in ('now', 'earlier', 'before', 'after')}
    usual |= {'keep': np.ones_like(t), 'ends': np.ones(len(t), bool), 'step': np.arange(len(t))}
    time = flow.model_time(t)
    fields = usual | {'guided_at': time, 'of_x': drift[0], 'of_output': drift[1]} | given
    schedule = FlowSchedule(flow, time=given.pop('time', time),
                            **{name: np.asarray(value) for name, value in fields.items() if name != 'time'})
    for name in ('time', *fields):
        getattr(schedule, name).setflags(write=False)
    return schedule


def flow_schedule(flow: 'Flow', settings: SamplerSettings) -> FlowSchedule | AdaptiveSchedule:
    """The evaluations of a method with these settings, checked by `Flow.check`."""
    method = settings.method
    if method == 'dpm++':
        return _dpm(flow, settings)
    if method in SDES:
        return _sde(flow, settings)
    start, end = flow.interval(training=False)
    if method == 'dopri5':
        return AdaptiveSchedule(flow, start, end, settings.steps, settings.tolerance)
    t = _grid(start, end, settings.steps, settings.shift)
    if method == 'euler':
        return _rows(flow, t[:-1], _velocity(flow, t[:-1]), now=np.diff(t))
    return _heun(flow, t, _velocity, np.diff(t), corrected=settings.steps - (method == 'heun'),
                 own_guidance=method == 'heun2')


def _grid(start: float, end: float, steps: int, shift: float) -> np.ndarray:
    """steps + 1 times; the shift acts on [0, 1], of which the interval is a part (LightningDiT)."""
    t = np.linspace(start, end, steps + 1)
    return 1 - shifted(1 - t, shift) if shift != 1 else t


def _velocity(flow: 'Flow', t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return prediction_weights(coefficients(flow.path, t), flow.prediction, 'velocity')


def _heun(flow: 'Flow', t: np.ndarray, drift: Callable, h: np.ndarray, corrected: int,
          own_guidance: bool = True, **noise) -> FlowSchedule:
    """Two evaluations in each of the first `corrected` steps from t[i] by h[i], one in the others."""
    number = np.concatenate([np.repeat(np.arange(corrected), 2), np.arange(corrected, len(h))])
    second = np.append(False, number[1:] == number[:-1])
    first_of_two = np.append(second[1:], False)
    times = np.where(second, t[number] + h[number], t[number])
    size = h[number]
    at = times if own_guidance else t[number]
    each = {name: np.where(second, 0.0, value[number]) for name, value in noise.items()}
    return _rows(flow, times, drift(flow, times), guided_at=flow.model_time(at), step=number,
                 now=np.where(second, size / 2, size), earlier=np.where(second, size / 2, 0.0),
                 ends=~first_of_two, **each)


def _sde(flow: 'Flow', settings: SamplerSettings) -> FlowSchedule:
    start, end = flow.interval(training=False)
    has_last = settings.last_step != 'none'
    if has_last:
        t = np.linspace(start, 1 - settings.last_size, settings.steps)
    else:
        t = np.linspace(start, end, settings.steps + 1)

    def diffusion(t):
        return FORMS[settings.sde_form](t, coefficients(flow.path, t), settings.sde_norm)

    def drift(flow, t):
        (v_x, v_out), (s_x, s_out) = (prediction_weights(coefficients(flow.path, t), flow.prediction, wanted)
                                      for wanted in ('velocity', 'score'))
        return v_x + diffusion(t) * s_x, v_out + diffusion(t) * s_out

    h = np.diff(t)
    with np.errstate(all='ignore'):      # what is not finite is told below
        noise = np.sqrt(2 * diffusion(t[:-1]) * h)
        if settings.method == 'sde':
            rows = _rows(flow, t[:-1], drift(flow, t[:-1]), now=h, after=noise)
        else:
            rows = _heun(flow, t[:-1], drift, h, corrected=len(h), before=noise)
    _check_finite(rows, settings)
    return _with_last_step(rows, t[-1:], drift, settings) if has_last else rows


def _check_finite(rows: FlowSchedule, settings: SamplerSettings) -> None:
    if not all(np.isfinite(part).all() for part in (rows.of_x, rows.of_output, rows.after, rows.before)):
        raise UserError(f'the form {shown(settings.sde_form)} of {settings.method} is not finite for a model '
                        f'of {rows.flow.prediction} on the path {rows.flow.path}'
                        f'{"" if settings.last_step != "none" else " without a last step"}: '
                        f'take the form sigma, and a last step')


def _with_last_step(rows: FlowSchedule, t: np.ndarray, drift: Callable,
                    settings: SamplerSettings) -> FlowSchedule:
    """From 1 - h to the data, without noise: along the drift of the SDE or of the ODE, or Tweedie's mean."""
    flow, c = rows.flow, coefficients(rows.flow.path, t)
    if settings.last_step == 'tweedie':
        of_x, of_output = prediction_weights(c, flow.prediction, 'clean')
        keep, now = np.zeros(1), np.ones(1)
    else:
        of_x, of_output = (drift if settings.last_step == 'mean' else _velocity)(flow, t)
        keep, now = np.ones(1), np.full(1, settings.last_size)
    last = _rows(flow, t, (of_x, of_output), keep=keep, now=now, step=np.full(1, rows.num_steps))
    names = [name for name in FlowSchedule.__dataclass_fields__ if name != 'flow']
    return FlowSchedule(flow, **{name: np.concatenate([getattr(rows, name), getattr(last, name)])
                                 for name in names})


def _dpm(flow: 'Flow', settings: SamplerSettings) -> FlowSchedule:
    """DPMSolverMultistepScheduler(use_flow_sigmas, flow_prediction): from 0.999 (shifted) down to 0, at times
    rounded down to whole timesteps."""
    sigma = shifted(1 - np.linspace(1, 1 / TABLE, settings.steps + 1), settings.shift)[:0:-1]
    t = 1 - sigma
    now, end = coefficients(flow.path, t), coefficients(flow.path, np.ones(1))
    a, b, c = solver_coefficients(np.append(now.alpha, end.alpha),
                                  np.append(now.sigma, 0.0)).T
    seen = flow.model_time(1 - np.floor(TABLE * sigma) / TABLE)
    return _rows(flow, t, prediction_weights(now, flow.prediction, 'clean'), time=seen, guided_at=seen,
                 keep=a, now=b * (1 + c), earlier=-b * c)


def sample_flow(model_fn: Callable, x_T: Array, cond: Mapping[str, Array], *, schedule: FlowSchedule,
                key: Array | None = None, noise: Array | None = None, eta: float = 0.0,
                trajectory: bool = False) -> Array:
    """All fixed-step methods. Arguments: see `samplers`; t_B are the flow's own times, in the state's dtype.
    noise: [steps, B, H, W, C]; the last step of an `sde` has none. eta is ignored. trajectory: the state
    after each step."""
    dtype, flow = accumulator(x_T), schedule.flow
    draw, entries = noise_source(schedule, x_T, key, noise, needed=schedule.random)
    at = getattr(model_fn, 'guided_at', None)      # of `guidance.guide`

    def predict(x, t_B, guided_at_B):
        call = model_fn if at is None else at(guided_at_B)
        output = call(x, t_B, cond)
        return flow.split(output.astype(dtype), x.shape[-1])

    x_0, states = scan_rows(predict, x_T.astype(dtype), schedule.rows(dtype),
                            (lambda step: draw(entries[step])) if schedule.random else None)
    return states[np.flatnonzero(schedule.ends)] if trajectory else x_0


def scan_rows(predict: Callable, x_T: Array, rows: Mapping[str, Array],
              draw: Callable | None) -> tuple[Array, Array]:
    """(the last state, the state after every evaluation) of `FlowSchedule.rows`. draw: (step) -> noise, or
    None. predict: (x, t_B, guided_at_B) -> prediction.

    Each image looks its factors up: scalars would be multiplied in another order in the program of another
    number of devices, and bits do not depend on devices."""
    scalars = {name: rows[name] for name in ('ends', 'first', 'step') if name in rows}

    def body(carry, scan):
        (x, base, k_before), (number, row) = carry, scan
        numbers_B = jnp.full(x.shape[:1], number)      # len(x) may be unknown, in exports
        own = {name: table[numbers_B] for name, table in rows.items() if name not in scalars}
        time, guided_at = own.pop('time'), own.pop('guided_at')
        own = {name: value.reshape(-1, *[1] * (x.ndim - 1)) for name, value in own.items()}
        noise = None if draw is None else draw(row['step'])

        def times(name, value):
            return own[name] * value if name in own else value

        if noise is not None and 'before' in own:
            x = x + own['before'] * noise
            base = jnp.where(row['first'], x, base) if 'first' in row else x
        if 'ends' not in row:
            base = x
        k = times('of_output', predict(x, time, guided_at))
        if 'of_x' in own:
            k = own['of_x'] * x + k
        x = times('keep', base) + own['now'] * k
        if 'earlier' in own:
            x = x + own['earlier'] * k_before
        if noise is not None and 'after' in own:
            x = x + own['after'] * noise
        kept = jnp.where(row['ends'], x, base) if 'ends' in row else None
        return (x, kept, k if 'earlier' in own else None), x

    start = x_T, x_T if 'ends' in rows else None, jnp.zeros_like(x_T) if 'earlier' in rows else None
    (x_0, _, _), states = jax.lax.scan(body, start, (jnp.arange(len(rows['step'])), scalars))
    return x_0, states


FLOW_SAMPLERS: Mapping[str, Callable] = {**dict.fromkeys(FLOW_METHODS, sample_flow), 'dopri5': sample_dopri5}
