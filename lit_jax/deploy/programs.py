"""What is exported: the model, or its guided sampler, as a function of its parameters and named inputs."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import export

from lit_jax.diffusion.settings import CLASSES, PROMPTS, SamplerSettings
from lit_jax.models.facts import has_null_class
from lit_jax.models.network import DTYPES, Network
from lit_jax.sampling.program import build_sampler

NOISY = 'ddpm', 'sde', 'sde_heun'      # samplers that draw noise at each step; with eta ddim does, too


@dataclass(frozen=True)
class Program:
    """function(params, **inputs) -> array. inputs: name -> shape and dtype, with sizes that are not known.

    settings: of a sampler."""
    function: Callable
    params: dict
    inputs: dict[str, jax.ShapeDtypeStruct]
    output: str
    settings: SamplerSettings | None = None


def model_program(config: Mapping, *, dtype: str = 'float32', any_size: bool = False,
                  scan_layers: bool = True) -> Program:
    """(x [B, H, W, C], t [B], label [B] or text [B, L, C] and text_mask [B, L]) -> [B, H, W, 2C].
    The times of a flow are fractions.

    any_size: of a text model, H and W are not fixed."""
    network = Network(config['model'], dtype=DTYPES[dtype], scan_layers=scan_layers)

    def function(params, x, t, **cond):
        return network.apply(params, x, t, cond).astype(jnp.float32)

    x, t, cond = open_inputs(network, any_size)
    if config['diffusion'].get('kind') == 'flow':
        t = t.update(dtype=jnp.float32)
    return Program(function, network.abstract(), {'x': x, 't': t, **cond}, 'output')


def sampler_program(config: Mapping, settings: SamplerSettings, *, dtype: str = 'float32',
                    scan_layers: bool = True) -> Program:
    """(noise [B, H, W, C], label or text, ...) -> images or latents [B, H, W, C], divided by their scale.

    Samplers that draw noise take step_noise [steps, B, H, W, C]; guided text models null_text and
    null_text_mask. UserError for settings that the model cannot be drawn with."""
    settings.check_model(config)
    network = Network(config['model'], dtype=DTYPES[dtype], scan_layers=scan_layers)
    sample = build_sampler(network, settings, config)

    def function(params, noise, step_noise=None, **cond):
        return sample(params, noise, cond, None, step_noise)

    noise, _, cond = open_inputs(network, False)
    inputs = {'noise': noise}
    if settings.method in NOISY or settings.eta:
        inputs['step_noise'] = jax.ShapeDtypeStruct((settings.steps, *noise.shape), noise.dtype)
    if network.conditioning == 'text' and settings.cfg_scale != 1:
        cond |= {f'null_{name}': value for name, value in cond.items()}
    return Program(function, network.abstract(), {**inputs, **cond}, 'images', settings)


def sampler_settings(config: Mapping, flags) -> SamplerSettings:
    """Those of the flags, else the model's own, else the defaults."""
    defaults = CLASSES if 'num_classes' in config['model'] else PROMPTS
    settings = defaults.of_model(config).updated(flags)
    return settings if has_null_class(config['model']) else settings.check_model(config)


def open_inputs(network: Network, any_size: bool) -> tuple:
    """(x, t, cond) with a batch of any size, and sides of any size."""
    x, t, cond = network.example_inputs()
    scope = export.SymbolicScope()
    batch, = export.symbolic_shape('batch', scope=scope)
    sides = x.shape[1:3]
    if any_size:
        rows, columns = export.symbolic_shape('rows, columns', scope=scope)
        patch = network.arch['patch']
        sides = patch * rows, patch * columns

    def opened(array, *more):
        return jax.ShapeDtypeStruct((batch, *(more or array.shape[1:])), array.dtype)

    return opened(x, *sides, x.shape[3]), opened(t), {name: opened(value) for name, value in cond.items()}
