"""The diffusion of a model as one object, chosen by `kind` in the section `diffusion` of a recipe or a model
folder: `Ddpm` (DiT, PixArt), or `Flow` (SiT, REPA, LightningDiT). Training, sampling and analysis call the
methods that both have, and never ask which it is:

    draw_times(key, size)                   the model's times t_B of training examples
    add_noise(x0, t_B, noise)               x_t
    losses(output, x0, x_t, t_B, noise)     {term: [B]}, whose sum is minimised
    distillation(student, teacher, C)       {term: [B]}
    quarters(values_B, t_B)                 sums and counts by quarter of the noise, for the log
    check(settings), sampler(settings)      the sampler of `SamplerSettings`: (model_fn, x_T, cond, *, key)
    guided_times(interval)                  where guidance acts, in the model's times
    spread_times(count), time_of_noise(share), check_time(flag, t)      the model's times of an analysis
    to_json(), decides                      what is written down, and what of it decides a sample
"""
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from lit_jax.diffusion.distillation import distillation_losses
from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.objective import per_quarter, q_sample, training_losses
from lit_jax.diffusion.schedule import KINDS as SCHEDULES
from lit_jax.diffusion.schedule import Schedule, make_schedule
from lit_jax.diffusion.settings import DDPM_METHODS, SamplerSettings
from lit_jax.runtime.errors import UserError, check_known, shown

Array = jax.Array


@dataclass(frozen=True)
class Ddpm:
    """DiT's: noise (and variance) predicted at whole timesteps. steps: of the schedule, a name of
    `schedule.KINDS`."""
    steps: int = 1000
    schedule: str = 'linear'

    kind = 'ddpm'
    unit, methods = 'timestep', DDPM_METHODS
    decides = 'kind', 'steps', 'schedule'

    def __post_init__(self):
        check_known('diffusion.schedule', self.schedule, SCHEDULES)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 0 < self.steps <= 1_000_000:
            raise UserError(f'diffusion.steps must be a whole number over 0, at most 1000000, got '
                            f'{shown(self.steps)}')

    def to_json(self) -> dict:
        """As recipes and model folders hold it."""
        return {'kind': self.kind, 'steps': self.steps, 'schedule': self.schedule}

    def describe(self) -> str:
        return f'{self.schedule} schedule of {self.steps} steps'

    @functools.cached_property
    def table(self) -> Schedule:
        return make_schedule(self.steps, kind=self.schedule)

    def draw_times(self, key: Array, size: tuple[int, ...]) -> Array:
        return jax.random.randint(key, size, 0, self.table.num_steps)

    def add_noise(self, x0: Array, t_B: Array, noise: Array) -> Array:
        return q_sample(self.table, x0, t_B, noise)

    def losses(self, output: Array, x0: Array, x_t: Array, t_B: Array, noise: Array) -> dict[str, Array]:
        return training_losses(self.table, output, x0, x_t, t_B, noise)

    def distillation(self, student: Array, teacher: Array, channels: int) -> dict[str, Array]:
        return distillation_losses(student, teacher, channels)

    def quarters(self, values_B: Array, t_B: Array) -> tuple[Array, Array]:
        return per_quarter(values_B, t_B, self.table.num_steps)

    def check(self, settings: SamplerSettings) -> None:
        """Raises UserError where a model of this kind cannot be sampled so."""
        self._schedule_of(settings)
        if settings.shift != 1:
            raise UserError(f'shift {settings.shift:g} is of flows; this model predicts noise at the steps '
                            f'of a schedule: leave it out')

    def _schedule_of(self, settings: SamplerSettings) -> Schedule:
        from lit_jax.diffusion.samplers import sampling_schedule
        return sampling_schedule(settings.method, settings.steps, self.steps, self.schedule)

    def sampler(self, settings: SamplerSettings) -> Callable:
        from lit_jax.diffusion.samplers import SAMPLERS
        return functools.partial(SAMPLERS[settings.method], schedule=self._schedule_of(settings),
                                 eta=settings.eta)

    def guided_times(self, interval: tuple[float, float]) -> tuple[float, float] | None:
        from lit_jax.diffusion.guidance import guided_timesteps
        return guided_timesteps(interval, self.steps)

    def spread_times(self, count: int) -> list[int]:
        """At most `count` evenly spaced times at which the model is trained, the first and the last too."""
        return sorted({round(t) for t in np.linspace(0, self.steps - 1, min(self.steps, count)).tolist()})

    def time_of_noise(self, share: float) -> int:
        """The time at this share of the schedule, from 0 (the least noise) to 1."""
        return int(share * self.steps)

    def check_time(self, flag: str, t: float) -> int:
        """A time as the model takes it. UserError for one at which it is not trained."""
        if not (0 <= t < self.steps and t == int(t)):
            raise UserError(f'{flag}={t:g}: this model has the timesteps 0 to {self.steps - 1}')
        return int(t)


Diffusion = Ddpm | Flow
KINDS: Mapping[str, Any] = {'ddpm': Ddpm, 'flow': Flow}


def check_method(diffusion: Diffusion, settings: SamplerSettings) -> None:
    """Raises UserError for a sampler of another kind of diffusion, by name."""
    others = {method: kind for kind, own in KINDS.items() for method in own.methods
              if method not in diffusion.methods}
    if settings.method in others:
        raise UserError(f'the sampler {settings.method} is for models of {others[settings.method]}, this one '
                        f'is of {diffusion.kind}: take {", ".join(diffusion.methods)}')
    check_known('sampler', settings.method, diffusion.methods)


def read_diffusion(section: Mapping) -> Diffusion:
    """The object of a section `diffusion`; fields of another kind are ignored, missing ones have their
    defaults. Earlier versions knew ddpm only, and wrote the name of its schedule as `kind`."""
    kind = section.get('kind', 'ddpm')
    if kind in tuple(SCHEDULES):
        section, kind = {**section, 'schedule': kind}, 'ddpm'
    check_known('diffusion.kind', kind, KINDS)
    own = KINDS[kind]
    return own(**{field.name: section[field.name] for field in fields(own) if field.name in section})


def default_section() -> dict:
    """The section of a recipe: a ddpm, with the fields of a flow at their defaults."""
    return {**Ddpm().to_json(), **{name: value for name, value in Flow().to_json().items() if name != 'kind'}}


def deciding(section: Mapping) -> dict:
    """What of a section decides a sample: in which two models must agree."""
    diffusion = read_diffusion(section)
    return {name: getattr(diffusion, name) for name in diffusion.decides}
