"""The options of `sample.py`, for models of classes and of prompts. Imports no jax."""
from dataclasses import dataclass

from lit_jax.diffusion.settings import CLASSES, FLOW_METHODS, PRESETS, PROMPTS, RECORDED
from lit_jax.runtime.options import Processes, option

OF_CLASSES, OF_PROMPTS = 'images, for class-conditional models', 'images, for text-to-image models'
HOW, DEVICES = 'sampler', 'devices'
METHODS = ('ddpm, ddim, or DPM-Solver++(2M): dpm++ as in diffusers, dpm++original as in PixArt; of flows '
           f'{", ".join(FLOW_METHODS)}')


def setting(help: str, name: str, **more):
    """An option of the sampler, which has two defaults."""
    values = [' '.join(map(str, value)) if isinstance(value, tuple) else value
              for value in (getattr(CLASSES, name), getattr(PROMPTS, name))]
    said = values[0] if values[0] == values[1] else f'{values[0]}, for prompts {values[1]}'
    model = 'the model\'s own, else ' if name in RECORDED else ''
    return option(f'{help}; default: {model}{said}', default=None, group=HOW, **more)


@dataclass(frozen=True, kw_only=True)
class SamplerFlags:
    """`SamplerSettings` as options; None: the preset's, else the model's own, else the default."""
    preset: str | None = option('how published figures of flows were drawn; other flags of the sampler win',
                                choices=tuple(PRESETS), default=None, group=HOW)
    method: str | None = setting(METHODS, 'method')
    steps: int | None = setting('model evaluations', 'steps')
    eta: float | None = setting('noise of ddim: 0 is deterministic, 1 as much as ddpm', 'eta')
    cfg_scale: float | None = setting('classifier-free guidance scale, 1: none', 'cfg_scale')
    cfg_channels: int | str | None = setting('noise channels that are guided', 'cfg_channels',
                                             choices=(3, 'all'))
    cfg_interval: tuple[float, float] | None = setting('guided part of the schedule, from 0 (image) to 1 '
                                                       '(noise)', 'cfg_interval', nargs=2,
                                                       metavar=('LOW', 'HIGH'))
    shift: float | None = setting('of the times of a flow, above 1 to the noise', 'shift')
    sde_form: str | None = setting('diffusion of sde: sigma (SiT), linear (REPA), constant, sbdm, '
                                   'decreasing, increasing_decreasing', 'sde_form')
    sde_norm: float | None = setting('factor of that diffusion', 'sde_norm')
    last_step: str | None = setting('of sde: mean, euler, tweedie or none', 'last_step')
    last_size: float | None = setting('time that it takes', 'last_size')
    tolerance: float | None = setting('relative error of a step of dopri5', 'tolerance')


@dataclass(frozen=True, kw_only=True)
class SampleRequest(SamplerFlags, Processes):
    """What to draw, and where it goes. One of `source` and `compare`."""
    source: str | None = option('model folder or workdir', flag='--from', default=None)
    vae: str | None = option('VAE folder, for latent models', default=None)
    out: str = option('NAME.png, NAME.npz or a folder', default='grid.png')

    compare: tuple[str, str] | None = option(
        'two models instead of --from, side by side on the same noise', flag='--grid_compare', nargs=2,
        metavar=('A', 'B'), default=None, group=OF_CLASSES)
    classes: str = option('names or numbers of classes, comma separated; default: of a grid the first 10, '
                          'of a set all', default='', metavar='NAME,...', group=OF_CLASSES)
    per_class: int | None = option('images per class; default of a grid: 8', default=None, group=OF_CLASSES)
    count: int | None = option('images in a set, all classes together', default=None, group=OF_CLASSES)
    labels: str | None = option('class labels of a set; default: random with --count, balanced with '
                                '--per_class', choices=('random', 'balanced'), default=None, group=OF_CLASSES)
    batch_size: int = option('max images in flight per host; does not affect the output; 0: chosen from the '
                             'devices', default=0, group=OF_CLASSES)

    text_encoder: str | None = option('text encoder folder', default=None, group=OF_PROMPTS)
    prompt: tuple[str, ...] = option('what to draw; may be given several times', repeat=True, default=(),
                                     metavar='TEXT', group=OF_PROMPTS)
    prompts: str | None = option('text file with one prompt per line', default=None, metavar='FILE',
                                 group=OF_PROMPTS)
    negative_prompt: str = option('what guidance leads away from; default: the empty prompt', default='',
                                  metavar='TEXT', group=OF_PROMPTS)
    seeds: str | None = option('0,1,2: each prompt is drawn once per seed; instead of --seed', default=None,
                               group=OF_PROMPTS)
    size: str | None = option('WIDTHxHEIGHT in pixels, or one number; default: the size that the model was '
                              'trained for', default=None, group=OF_PROMPTS)
    geneval: str | None = option('draw the prompts of this folder (evaluate.py geneval --prompts_out) into '
                                 'it, 4 seeds of each', default=None, metavar='DIR', group=OF_PROMPTS)
    text_dtype: str | None = option('of the text encoder: float32, bfloat16, or int8 (a quarter of the '
                                    'memory); default: float32 on CPU, bfloat16 elsewhere', default=None,
                                    group=OF_PROMPTS)
    low_memory: bool = option('keep one network in memory at a time: text encoder, backbone, VAE',
                              default=False, group=OF_PROMPTS)
    tile: int = option('side of the squares that the VAE decodes one by one, in latent pixels; 0: 64 with '
                       '--low_memory and above 1024 pixels, else the whole image', default=0,
                       group=OF_PROMPTS)

    seed: int | None = option('random seed; image i depends on the seed and i (of a prompt: on the seed), '
                              'not on batches or devices; default: 0', default=None, group=HOW)
    dtype: str = option('compute dtype: float32 or bfloat16', default='float32', group=HOW)

    group: int | None = option('images that a device computes together; fewer take less memory, another '
                               'number rounds differently; default: 16, for prompts 1 to 8 by their size',
                               default=None, group=DEVICES)

    @property
    def sources(self) -> tuple[str, ...]:
        return self.compare or (self.source,)
