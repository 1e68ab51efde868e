"""Flow matching as the diffusion of a model (`lit_jax.diffusion.kinds`): SiT, REPA, LightningDiT.

Inside, time runs from noise at 0 to data at 1 (`flow_paths`). The model has a time of its own: the same for
SiT and LightningDiT (`noise_at` 0), turned round for REPA and diffusers (1), whose velocity points to the
noise.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.flow_paths import (
    PATHS,
    PREDICTIONS,
    Coefficients,
    coefficients,
    convert_prediction,
    shifted,
)
from lit_jax.diffusion.objective import per_quarter
from lit_jax.diffusion.settings import FLOW_METHODS, SDES, SamplerSettings
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, check_known, shown

Array = jax.Array
WEIGHTINGS = 'none', 'velocity', 'likelihood'
TIMES = 'uniform', 'logit_normal', 'log_normal'
_WEIGHTED = 'noise', 'score'
EPS = 1e-3                   # from the ends at which a prediction says nothing: SiT's
EPS_VP_TRAINING = 1e-5


@dataclass(frozen=True)
class Flow:
    """A flow from noise to data. UserError for a choice that there is not.

    Attributes:
        path: a name of PATHS. prediction: one of PREDICTIONS, what the model's first C channels are.
        noise_at: 0 or 1, the model's time of pure noise; the data are at the other end.
        weighting: of the loss of noise and score: 'velocity' (λ/σ)², 'likelihood' λ/σ², 'none' 1.
        times: in training: 'uniform'; 'logit_normal', t = sigmoid(n) (LightningDiT); 'log_normal',
            σ/α = exp(n) (REPA); n is standard normal times `time_std`.
        time_shift: of the times in training, above 1 to the noise: σ' = s·σ/(1 + (s - 1)·σ) with σ = 1 - t,
            as in Stable Diffusion 3.
        cosine: weight of LightningDiT's second term, 1 - cosine of predicted and true over the channels."""
    path: str = 'linear'
    prediction: str = 'velocity'
    noise_at: int = 0
    weighting: str = 'none'
    times: str = 'uniform'
    time_std: float = 1.0
    time_shift: float = 1.0
    cosine: float = 0.0

    kind = 'flow'
    unit, methods = 'time', FLOW_METHODS
    decides = 'kind', 'path', 'prediction', 'noise_at'       # a sample; the rest decides the training

    def __post_init__(self):
        check_known('diffusion.path', self.path, PATHS)
        check_known('diffusion.prediction', self.prediction, PREDICTIONS)
        check_known('diffusion.weighting', self.weighting, WEIGHTINGS)
        check_known('diffusion.times', self.times, TIMES)
        if self.noise_at not in (0, 1) or isinstance(self.noise_at, bool):
            raise UserError(f'diffusion.noise_at is the time of pure noise, 0 (SiT, LightningDiT) or 1 '
                            f'(REPA), got {shown(self.noise_at)}')
        if self.weighting != 'none' and self.prediction not in _WEIGHTED:
            raise UserError(f'diffusion.weighting {shown(self.weighting)} weighs the errors of '
                            f'{" and ".join(_WEIGHTED)}; a prediction of {self.prediction} has none')
        for name, low in (('time_shift', True), ('time_std', True), ('cosine', False)):
            check_factor(f'diffusion.{name}', getattr(self, name), above=low)
        if self.cosine and self.prediction != 'velocity':
            raise UserError(f'diffusion.cosine compares velocities; this model predicts {self.prediction}: '
                            f'set it to 0')

    def to_json(self) -> dict:
        """As recipes and model folders hold it."""
        return {'kind': self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}

    def describe(self) -> str:
        return f'{self.prediction} of a flow on the {self.path} path, noise at time {self.noise_at}'

    # Times.

    def interval(self, training: bool = True) -> tuple[float, float]:
        """The times from noise to data at which the model is trained, or evaluated by a solver of the ODE."""
        if self.path == 'vp':
            return 0.0, 1 - (EPS_VP_TRAINING if training else EPS)
        eps = 0.0 if self.prediction == 'velocity' else EPS
        return eps, 1 - eps

    def model_time(self, t) -> Any:
        """The model's time of the time t, and back: it is its own inverse."""
        return 1 - t if self.noise_at else t

    def spread_times(self, count: int) -> list[float]:
        """`count` evenly spaced model's times at which the model is trained, from the first to the last."""
        return sorted(float(self.model_time(t)) for t in np.linspace(*self.interval(), count))

    def time_of_noise(self, share: float) -> float:
        """The model's time at this share of the way from the data, 0, to the noise, 1."""
        low, high = self.interval()
        return float(self.model_time(high - share * (high - low)))

    def check_time(self, flag: str, t: float) -> float:
        """A model's time as a number. UserError for one at which the model is not trained."""
        low, high = sorted(self.model_time(end) for end in self.interval())
        if not low <= t <= high:
            raise UserError(f'{flag}={t:g}: this flow has the times {low:g} to {high:g} '
                            f'({self.noise_at}: pure noise)')
        return float(t)

    def at(self, t_B: Array, like: Array) -> Coefficients:
        """α, σ and their derivatives by t at the model's times t_B, to multiply with `like` [B, ...]."""
        t = self.model_time(t_B.astype(accumulator(like)))
        return coefficients(self.path, t.reshape(t.shape + (1,) * (like.ndim - 1)))

    def draw_times(self, key: Array, size: tuple[int, ...]) -> Array:
        """The model's times of training examples, float32."""
        if self.times == 'uniform':
            t = self.times_of(jax.random.uniform(key, size))
        else:
            t = self.times_of(jax.random.normal(key, size))
        return t

    def times_of(self, drawn: Array) -> Array:
        """The model's times of standard draws: of [0, 1) for 'uniform', else normal."""
        low, high = self.interval()
        if self.times == 'uniform':
            t = drawn
        elif self.times == 'logit_normal':
            t = jax.nn.sigmoid(drawn * self.time_std)
        else:
            t = PATHS[self.path].time_of(jnp.exp(drawn * self.time_std), jnp)
        if self.time_shift != 1:
            t = 1 - shifted(1 - t, self.time_shift)
        return self.model_time(low + t * (high - low))

    # Training.

    def add_noise(self, x0: Array, t_B: Array, noise: Array) -> Array:
        """x_t [B, H, W, C]."""
        c = self.at(t_B, x0)
        return c.alpha * x0 + c.sigma * noise

    def split(self, output: Array, channels: int) -> Array:
        """The prediction, the first C channels of an output, along the path (as `flow_paths` has it). SiT's
        second half (learn_sigma) is dropped, as its code does."""
        if output.shape[-1] not in (channels, 2 * channels):
            raise UserError(f'the model outputs {output.shape[-1]} channels for inputs of {channels}; '
                            f'expected {channels}, or {2 * channels}, of which a flow drops the second half')
        output = output[..., :channels]
        return -output if self.noise_at and self.prediction == 'velocity' else output

    def target(self, x0: Array, t_B: Array, noise: Array) -> Array:
        """What a perfect model predicts, as `split` gives it."""
        c = self.at(t_B, x0)
        return {'velocity': lambda: c.d_alpha * x0 + c.d_sigma * noise, 'noise': lambda: noise,
                'clean': lambda: x0, 'score': lambda: -noise / c.sigma}[self.prediction]()

    def losses(self, output: Array, x0: Array, x_t: Array, t_B: Array, noise: Array) -> dict[str, Array]:
        """{'mse'}, and 'cosine' times its weight if it has one, each [B], means over pixels and channels. The
        error of a score is multiplied by σ first (SiT), so that it is one of noise."""
        dtype = accumulator(output, x0, x_t, noise)
        output, x0, noise = (array.astype(dtype) for array in (output, x0, noise))
        predicted, c = self.split(output, x0.shape[-1]), self.at(t_B, x0)
        target = self.target(x0, t_B, noise)
        if self.prediction == 'score':
            predicted, target = c.sigma * predicted, -noise
        weight = {'none': lambda: 1.0, 'velocity': lambda: (c.spread / c.sigma) ** 2,
                  'likelihood': lambda: c.spread / c.sigma ** 2}[self.weighting]()
        terms = {'mse': _mean(weight * jnp.square(predicted - target))}
        if self.cosine:
            terms['cosine'] = self.cosine * _mean(1 - _cosine(predicted, target))
        return terms

    def distillation(self, student: Array, teacher: Array, channels: int) -> dict[str, Array]:
        """{'distill_' + prediction}: mean squared difference [B] from the teacher's, without its gradient."""
        dtype = accumulator(student, teacher)
        mine, other = (self.split(output.astype(dtype), channels) for output in (student, teacher))
        return {f'distill_{self.prediction}': _mean(jnp.square(mine - jax.lax.stop_gradient(other)))}

    def quarters(self, values_B: Array, t_B: Array) -> tuple[Array, Array]:
        """`per_quarter` of the time of noise, from 0 (data) to 1 (noise)."""
        quarter = jnp.clip(jnp.floor(4 * (1 - self.model_time(t_B))), 0, 3).astype(jnp.int32)
        return per_quarter(values_B, quarter, 4)

    # Sampling.

    def check(self, settings: SamplerSettings) -> None:
        """Raises UserError where a model of this flow cannot be sampled so."""
        from lit_jax.diffusion.flow_samplers import FORMS, LAST_STEPS, flow_schedule
        if settings.steps < 1:
            raise UserError(f'sampling takes at least 1 step, got {settings.steps}')
        check_factor('shift', settings.shift)
        check_factor('tolerance', settings.tolerance)
        if settings.method in SDES:
            check_known('sde_form', settings.sde_form, FORMS)
            check_known('last_step', settings.last_step, LAST_STEPS)
            check_factor('sde_norm', settings.sde_norm)
            if not 0 < settings.last_size < 1:
                raise UserError(f'last_size, the time that the last step of {settings.method} takes, must '
                                f'lie between 0 and 1, got {settings.last_size:g}')
            if settings.last_step != 'none' and settings.steps < 2:
                raise UserError(f'{settings.method} takes at least 2 steps, of which one is the last')
        flow_schedule(self, settings)

    def sampler(self, settings: SamplerSettings) -> Callable:
        """(model_fn, x_T, cond, *, key) -> x_0."""
        from lit_jax.diffusion.flow_samplers import FLOW_SAMPLERS, flow_schedule
        return functools.partial(FLOW_SAMPLERS[settings.method], schedule=flow_schedule(self, settings))

    def guided_times(self, interval: tuple[float, float]) -> tuple[float, float] | None:
        """The model's times of (low, high), from 0, image, to 1, noise; None for all."""
        from lit_jax.diffusion.guidance import check_interval
        low, high = check_interval(interval)
        if (low, high) == (0, 1):
            return None
        return (low, high) if self.noise_at else (1 - high, 1 - low)

    def convert(self, output: Array, x_t: Array, t_B: Array, wanted: str) -> Array:
        """An output as another prediction, along the path."""
        given = self.split(output, x_t.shape[-1])
        return convert_prediction(self.at(t_B, x_t), x_t, given, self.prediction, wanted)


def check_factor(name: str, value, above: bool = True) -> None:
    """Raises UserError unless a value is a finite number above 0, or at least 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and value < 1e6
    if not good or not (value > 0 if above else value >= 0):
        raise UserError(f'{name} must be a number {"above 0" if above else "from 0 on"}, got {shown(value)}')


def _mean(x: Array) -> Array:
    return x.mean(axis=tuple(range(1, x.ndim)))


def _cosine(a: Array, b: Array) -> Array:
    """Over the channels, [B, H, W]; each norm is at least 1e-8, as in PyTorch."""
    def norm(x):
        return jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1)), 1e-8)

    return (a * b).sum(-1) / (norm(a) * norm(b))
