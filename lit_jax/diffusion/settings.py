"""The settings of a sampler, for command lines, recipes, cards, the page and the evaluation. Imports no jax.

`CLASSES` and `PROMPTS` are the defaults for models of classes (those of DiT) and of prompts (those of
PixArt-Σ: guidance on all channels of the noise), where a model does not record those of its recipe.
"""
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from lit_jax.models.facts import NO_NULL_CLASS, has_null_class
from lit_jax.runtime.errors import UserError


@dataclass(frozen=True)
class SamplerSettings:
    """What decides how noise becomes a sample.

    Attributes:
        method: name in `lit_jax.diffusion.samplers.SAMPLERS`.
        steps: evaluations of the model, spread over the schedule as DiT spreads them.
        eta: noise of ddim, 0 to 1; the others have no such choice.
        cfg_scale: classifier-free guidance, 1: none.
        cfg_channels: noise channels it acts on, 3 as in DiT's published numbers, or 'all'.
        cfg_interval: the part of the schedule in which it acts, from 0 (the image) to 1 (pure noise).
    """
    method: str = 'ddpm'
    steps: int = 50
    eta: float = 0.0
    cfg_scale: float = 4.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, 'cfg_interval', tuple(self.cfg_interval))

    def updated(self, source, **changes) -> 'SamplerSettings':
        """These with what `source` (options, a section of a recipe) sets, then with `changes`."""
        found = {field.name: getattr(source, field.name, None) for field in fields(self)}
        return replace(self, **{name: value for name, value in found.items() if value is not None} | changes)

    def of_model(self, config: Mapping) -> 'SamplerSettings':
        """These with what the config of a model says in 'sampling' (`RECORDED`); older models say nothing."""
        told = config['sampling'] if isinstance(config.get('sampling'), Mapping) else {}
        known = replace(self, **{name: told[name] for name in RECORDED if told.get(name) is not None})
        return known if has_null_class(config.get('model') or {}) else replace(known, cfg_scale=1.0)

    def check_model(self, config: Mapping) -> 'SamplerSettings':
        """`check`, and guidance only of a model whose null class was trained. config: of the model."""
        if self.cfg_scale != 1 and not has_null_class(config.get('model') or {}):
            raise UserError(NO_NULL_CLASS)
        return self.check(config['diffusion'])

    def check(self, diffusion: Mapping) -> 'SamplerSettings':
        """These settings. Raises UserError where a model of this diffusion ({'steps', 'kind'}) cannot be
        sampled with them."""
        from lit_jax.diffusion.guidance import check_guidance, guided_timesteps
        from lit_jax.diffusion.samplers import sampling_schedule
        sampling_schedule(self.method, self.steps, diffusion['steps'], diffusion['kind'])
        if self.eta and self.method != 'ddim':
            raise UserError(f'eta {self.eta:g} belongs to ddim; {self.method} has no such choice')
        if not 0 <= self.eta <= 1:
            raise UserError(f'eta must lie between 0 (no noise) and 1 (as much as ddpm), got {self.eta:g}')
        check_guidance(self.cfg_scale, self.cfg_channels)
        guided_timesteps(self.cfg_interval, diffusion['steps'])
        return self

    def to_json(self) -> dict:
        """As cards hold them; `SamplerSettings(**card['sampler'])` reads them."""
        return {**asdict(self), 'cfg_interval': list(self.cfg_interval)}

    def describe(self) -> str:
        """'ddpm, 50 steps, cfg 4'."""
        low, high = self.cfg_interval
        where = '' if (low, high) == (0, 1) else f' in {low:g}..{high:g}'
        return f'{self.method}, {self.steps} steps, cfg {self.cfg_scale:g}{where}'


RECORDED = ('method', 'steps', 'cfg_scale')      # what a model records of its recipe's section `sample`
CLASSES = SamplerSettings()
PROMPTS = SamplerSettings(method='dpm++', steps=20, cfg_scale=4.5, cfg_channels='all')


def recorded(section) -> dict:
    """What a model keeps of its recipe's section `sample`."""
    return {name: getattr(section, name) for name in RECORDED}
