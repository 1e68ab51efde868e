"""The settings of a sampler, for command lines, recipes, cards, the page and the evaluation. Imports no jax.

`CLASSES` and `PROMPTS` are the defaults for models of classes (those of DiT) and of prompts (those of
PixArt-Σ: guidance on all channels of the noise), where a model does not record those of its recipe.
"""
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lit_jax.models.facts import NO_NULL_CLASS, has_null_class
from lit_jax.runtime.errors import UserError


@dataclass(frozen=True)
class SamplerSettings:
    """What decides how noise becomes a sample.

    Attributes:
        method: name in `lit_jax.diffusion.samplers.SAMPLERS`, of flows in `flow_samplers.FLOW_SAMPLERS`.
        steps: evaluations of the model, spread over the schedule as DiT spreads them; heun, heun2 and
            sde_heun evaluate it twice a step, dopri5 takes at most so many steps of six.
        eta: noise of ddim, 0 to 1; the others have no such choice.
        cfg_scale: classifier-free guidance, 1: none.
        cfg_channels: noise channels it acts on, 3 as in DiT's published numbers, or 'all'.
        cfg_interval: the part of the schedule in which it acts, from 0 (the image) to 1 (pure noise).
        shift: of the times of a flow, above 1 to the noise: σ' = s·σ/(1 + (s - 1)·σ). LightningDiT's 0.3 is
            1/0.3 here.
        sde_form, sde_norm: w(t) of sde and sde_heun, a name of `flow_samplers.FORMS` and its factor.
        last_step, last_size: what these end with, and the time that it takes (`flow_samplers.LAST_STEPS`).
        tolerance: relative, of dopri5.
    """
    method: str = 'ddpm'
    steps: int = 50
    eta: float = 0.0
    cfg_scale: float = 4.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    sde_form: str = 'sigma'
    sde_norm: float = 1.0
    last_step: str = 'mean'
    last_size: float = 0.04
    tolerance: float = 1e-3

    def __post_init__(self):
        object.__setattr__(self, 'cfg_interval', tuple(self.cfg_interval))

    def updated(self, source, **changes) -> 'SamplerSettings':
        """These with the preset that `source` (options, a section of a recipe) names, with what else it sets,
        then with `changes`."""
        preset = PRESETS[source.preset] if getattr(source, 'preset', None) else {}
        found = {field.name: getattr(source, field.name, None) for field in fields(self)}
        found = {name: value for name, value in found.items() if value is not None}
        return replace(self, **{**preset, **found, **changes})

    def of_kind(self, config: Mapping) -> 'SamplerSettings':
        """These, with the sampler of flows where the model is one and the method is not."""
        flow = (config.get('diffusion') or {}).get('kind') == 'flow'
        return replace(self, method=FLOW_METHOD) if flow and self.method not in FLOW_METHODS else self

    def of_model(self, config: Mapping) -> 'SamplerSettings':
        """These with what the config of a model says in 'sampling' (`RECORDED`); older models say nothing."""
        told = config['sampling'] if isinstance(config.get('sampling'), Mapping) else {}
        found = {name: told[name] for name in RECORDED if told.get(name) is not None}
        known = replace(self.of_kind(config), **found)
        return known if has_null_class(config.get('model') or {}) else replace(known, cfg_scale=1.0)

    def check_model(self, config: Mapping) -> 'SamplerSettings':
        """`check`, and guidance only of a model whose null class was trained. config: of the model."""
        if self.cfg_scale != 1 and not has_null_class(config.get('model') or {}):
            raise UserError(NO_NULL_CLASS)
        return self.check(config['diffusion'])

    def check(self, diffusion: Mapping) -> 'SamplerSettings':
        """These settings. Raises UserError where a model with this section `diffusion` cannot be sampled with
        them."""
        from lit_jax.diffusion.guidance import check_guidance
        from lit_jax.diffusion.kinds import check_method, read_diffusion
        kind = read_diffusion(diffusion)
        check_method(kind, self)
        for name, methods in BELONGS.items():
            if self.method not in methods and getattr(self, name) != getattr(CLASSES, name):
                raise UserError(f'{name} {getattr(self, name)} belongs to {", ".join(methods)}; '
                                f'{self.method} has no such choice')
        if not 0 <= self.eta <= 1:
            raise UserError(f'eta must lie between 0 (no noise) and 1 (as much as ddpm), got {self.eta:g}')
        kind.check(self)
        check_guidance(self.cfg_scale, self.cfg_channels)
        kind.guided_times(self.cfg_interval)
        return self

    def to_json(self) -> dict:
        """As cards hold them; `SamplerSettings(**card['sampler'])` reads them. Options that the method does
        not have are left out, and a shift of 1, which is none: older cards of dpm++ have none."""
        found = {**asdict(self), 'cfg_interval': list(self.cfg_interval)}
        if self.shift == 1:
            del found['shift']
        return {name: value for name, value in found.items()
                if name == 'eta' or self.method in BELONGS.get(name, (self.method,))}

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated, at most."""
        times = {'heun2': 2 * self.steps, 'heun': 2 * self.steps - 1, 'dopri5': 6 * (self.steps + 1),
                 'sde_heun': 2 * self.steps - (self.last_step != 'none')}
        return times.get(self.method, self.steps)

    def describe(self) -> str:
        """'ddpm, 50 steps, cfg 4'."""
        low, high = self.cfg_interval
        where = '' if (low, high) == (0, 1) else f' in {low:g}..{high:g}'
        more = ''.join(f', {name} {getattr(self, name)}' for name in BELONGS if name != 'eta'
                       and getattr(self, name) != getattr(CLASSES, name))
        return f'{self.method}, {self.steps} steps, cfg {self.cfg_scale:g}{where}{more}'


SDES = 'sde', 'sde_heun'
SHIFTED = 'euler', 'heun', 'heun2', 'dpm++'
FLOW_METHODS = *SHIFTED, *SDES, 'dopri5'
DDPM_METHODS = 'ddpm', 'ddim', 'dpm++', 'dpm++original'
# Options of some samplers. dpm++ is of both kinds of diffusion; only that of flows has a shift.
BELONGS = {'eta': ('ddim',), 'shift': SHIFTED, 'sde_form': SDES, 'sde_norm': SDES, 'last_step': SDES,
           'last_size': SDES, 'tolerance': ('dopri5',)}
RECORDED = ('method', 'steps', 'cfg_scale')      # what a model records of its recipe's section `sample`
CLASSES = SamplerSettings()
FLOW_METHOD = 'euler'      # in the place of those of ddpm
PROMPTS = SamplerSettings(method='dpm++', steps=20, cfg_scale=4.5, cfg_channels='all')
SCORES = SamplerSettings(steps=250, cfg_scale=1.0)      # of evaluate.py
# How published figures were drawn, with 250 evaluations (LightningDiT: on a grid of 250 points): SiT's 2.06
# (README of its code; the ODE is of its JAX code), REPA's 1.42, LightningDiT's 1.35 (2.11 after 64 epochs).
_LIGHTNING = {'method': 'euler', 'steps': 249, 'shift': 1 / 0.3, 'cfg_channels': 3}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    'sit_sde': {'method': 'sde', 'steps': 250, 'cfg_scale': 1.5, 'cfg_channels': 3},
    'sit_ode': {'method': 'heun2', 'steps': 125, 'cfg_scale': 1.5, 'cfg_channels': 3},
    'repa': {'method': 'sde', 'steps': 250, 'sde_form': 'linear', 'cfg_scale': 1.8, 'cfg_channels': 'all',
             'cfg_interval': (0.0, 0.7)},
    'lightningdit': _LIGHTNING | {'cfg_scale': 6.7, 'cfg_interval': (0.0, 0.875)},
    'lightningdit_64': _LIGHTNING | {'cfg_scale': 10.0, 'cfg_interval': (0.0, 0.9)}}


def recorded(section) -> dict:
    """What a model keeps of its recipe's section `sample`."""
    return {name: getattr(section, name) for name in RECORDED}
