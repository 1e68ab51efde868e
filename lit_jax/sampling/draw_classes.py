"""What `sample.py` does: a grid, two models side by side, single files, or an .npz set, from one command.

With several processes all of them call these functions together: grids are drawn by process 0, sets by all.
"""
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from lit_jax.checkpoint.load import load, read_weights_config
from lit_jax.checkpoint.vae_folder import Vae
from lit_jax.models.arch import conditioning
from lit_jax.models.network import Model
from lit_jax.report.grids import make_sheet, save_png, to_uint8, viewable
from lit_jax.runtime import cluster, peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.parts import make_missing
from lit_jax.runtime.paths import as_path
from lit_jax.runtime.progress import format_seconds
from lit_jax.sampling.card import make_card
from lit_jax.sampling.decoder import check_comparable, class_names, open_decoder
from lit_jax.sampling.draw_prompts import PromptRequest, draw_prompts
from lit_jax.sampling.groups import GROUP, GroupSampler, Images
from lit_jax.sampling.labels import choose_labels, parse_classes
from lit_jax.sampling.noise import check_seed
from lit_jax.sampling.program import build_sampler
from lit_jax.sampling.stores import open_store, part_size


@dataclass(frozen=True)
class Request:
    """The flags of `sample.py`, which explains them. `compare`: two sources instead of `source`."""
    out: str
    source: str | None = None
    compare: tuple[str, str] | None = None
    vae: str | None = None
    classes: str = ''
    per_class: int | None = None
    count: int | None = None
    labels: str | None = None
    cfg_scale: float = 4.0
    cfg_channels: int | str = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    steps: int = 50
    method: str = 'ddpm'
    eta: float = 0.0
    seed: int = 0
    dtype: str = 'float32'
    group: int = GROUP
    batch_size: int = 0

    def settings(self) -> dict:
        """The options of `build_sampler` that a person chooses."""
        return {'method': self.method, 'steps': self.steps, 'eta': self.eta, 'cfg_scale': self.cfg_scale,
                'cfg_channels': self.cfg_channels, 'cfg_interval': tuple(self.cfg_interval)}


def start(options: Mapping) -> str:
    """What a command line asks for: `draw`, or `draw_prompts` where the model takes prompts.

    options: the flags that were given, by the names of the fields of `Request` and `PromptRequest`, which
    hold the defaults. """
    if ('source' in options) == ('compare' in options):
        raise UserError('give one of --from (a model) and --grid_compare (two models)')
    sources = [options['source']] if 'source' in options else options['compare']
    configs = peers.together(lambda: [read_weights_config(source) for source in sources])
    kinds = {conditioning(config['model']) for config in configs}
    takes_text = 'text' in kinds
    known = {field.name for field in fields(PromptRequest if takes_text else Request)}
    if foreign := [_flag(name) for name in options if name not in known]:
        draws, instead = (('what a prompt says', '--prompt="..."') if takes_text
                          else ('classes', '--classes'))
        raise UserError(f'{", ".join(foreign)}: not for {sources[0]}, which draws {draws}: give it {instead}')
    if takes_text:
        return draw_prompts(PromptRequest(**{**options, 'prompt': tuple(options.get('prompt', ()))}))
    return draw(Request(**{'out': 'grid.png', **options}))


def _flag(name: str) -> str:
    return '--' + {'source': 'from', 'compare': 'grid_compare'}.get(name, name)


def draw(request: Request) -> str:
    """Does what is asked and returns one line about it. Raises UserError for a request that cannot be met."""
    check_seed(request.seed)
    if (request.source is None) == (request.compare is None):
        raise UserError('give one of --from (a model) and --grid_compare (two models)')
    if request.group < 1 or request.batch_size < 0:
        raise UserError(f'--group must be at least 1 and --batch_size not negative, got {request.group}, '
                        f'{request.batch_size}')
    is_grid = as_path(request.out).suffix == '.png'
    if request.compare is not None and not is_grid:
        raise UserError(f'--grid_compare draws one image: --out {request.out} must end with .png')
    return draw_grid(request) if is_grid else draw_set(request)


# ------------------------------------------------------------------------------------------------------
# Grids


def draw_grid(request: Request) -> str:
    """A PNG with one row a class; of two models, their grids side by side from the same noise."""
    if request.count is not None or request.labels is not None:
        raise UserError('a grid (.png) has --per_class images of each class of --classes; --count and '
                        '--labels are for sets: --out NAME.npz or a folder')
    sources = request.compare or (request.source,)
    models = [load(source, dtype=request.dtype) for source in sources]
    check_comparable([model.config for model in models], sources)
    classes = parse_classes(request.classes, models[0].network.null_label)
    per_class = 8 if request.per_class is None else request.per_class
    if per_class < 1:
        raise UserError(f'--per_class must be at least 1, got {per_class}')
    vaes = [open_decoder(model, request.vae, source) for model, source in zip(models, sources, strict=True)]
    _check_settings(models[0], request)
    started = time.perf_counter()

    def draw_and_save() -> None:
        labels = np.repeat(classes, per_class)
        panels = [('' if request.compare is None else str(source), _images(model, vae, labels, request))
                  for source, model, vae in zip(sources, models, vaes, strict=True)]
        scale = max(1, 32 // panels[0][1].shape[1])
        save_png(request.out, make_sheet(panels, per_class, class_names(models[0].config, classes),
                                         scale=scale))

    peers.only_lead(draw_and_save)
    false_colours = models[0].config['latent']['space'] != 'pixels' and vaes[0] is None
    note = ' (latents in false colours: give --vae the folder of the VAE to decode them)' if false_colours \
        else ''
    return (f'wrote {request.out}: {len(models) * per_class * len(classes)} images, {_say(request)}, '
            f'{time.perf_counter() - started:.1f} s{note}')


def _images(model: Model, vae, labels: np.ndarray, request: Request) -> np.ndarray:
    wanted = Images.of_classes(labels, request.seed)
    sampler = GroupSampler(model, request.settings(), wanted, group=request.group, vae=vae)
    return viewable(np.concatenate([images
                                    for _, images in sampler.draw(range(sampler.count), request.batch_size)]))


# ------------------------------------------------------------------------------------------------------
# Sets


@dataclass(frozen=True)
class Plan:
    """A set before it is drawn: everything that decides its bytes. shape: (H, W) of the images."""
    request: Request
    model: Model
    vae: Vae | None
    labels: np.ndarray
    card: dict
    shape: tuple[int, int]


def plan_set(request: Request, model: Model | None = None, weights_sha256: str | None = None) -> Plan:
    """Checks everything that can be wrong with a set, and that all processes want the same.

    model, weights_sha256: where it is loaded already, and its checksum is known."""
    model = model or load(request.source, dtype=request.dtype)
    policy = request.labels or ('balanced' if request.count is None else 'random')
    classes = parse_classes(request.classes, model.network.null_label, most=None)
    labels = choose_labels(policy, classes, seed=request.seed, count=request.count,
                           per_class=request.per_class)
    vae = open_decoder(model, request.vae, request.source)
    channels = model.arch['channels'] if vae is None else vae.network.arch['image_channels']
    if vae is None and model.config['latent']['space'] != 'pixels' or channels not in (1, 3):
        raise UserError(f'{request.source} draws latents; images for {request.out} need the VAE that decodes '
                        f'them: --vae DIR (id {model.config["latent"]["vae"]!r}; python '
                        f'convert_torch_ckpt.py DIFFUSERS_VAE --out DIR)')
    _check_settings(model, request)
    card = make_card(model, vae, request.settings(), labels, policy=policy, classes=classes,
                     seed=request.seed, group=min(request.group, len(labels)), dtype=request.dtype,
                     weights_sha256=weights_sha256)
    cluster.check_same({'recipe card': card, 'out': str(request.out), **cluster.code_facts()})
    down = 1 if vae is None else vae.network.downscale
    return Plan(request, model, vae, labels, card, tuple(side * down for side in model.arch['input_size']))


def draw_set(request: Request) -> str:
    """An .npz or a folder of images, by all processes, continued where an earlier call was stopped."""
    plan = plan_set(request)
    store = open_store(request.out, plan.card, plan.labels, plan.shape, part_size(request.group))
    if not peers.from_lead(store.begin):
        return f'{store.describe()}; it was whole already, by the same recipe'
    started = time.perf_counter()
    drawn = draw_parts(plan, store)
    return (f'wrote {store.describe()}; {drawn:,} images now, {_say(request)}, '
            f'{format_seconds(time.perf_counter() - started)}')


def draw_parts(plan: Plan, store, sampler: GroupSampler | None = None) -> int:
    """Draws what a store is missing, by all processes, and finishes it; returns how many images were drawn.

    store: Parts with `missing()`, `write(part, images)` and `finish()`: `lit_jax.sampling.stores`.
    sampler: of this very plan, where there is one that is compiled already.
    """
    request = plan.request
    sampler = sampler or GroupSampler(plan.model, request.settings(),
                                      Images.of_classes(plan.labels, request.seed),
                                      group=request.group, vae=plan.vae)
    a_part = max(1, store.size // sampler.group)

    def draw(mine: list[int]):
        """The devices work on while a part is written: the next groups are on their way."""
        groups = [range(part * a_part, min((part + 1) * a_part, sampler.count)) for part in mine]
        drawn = sampler.draw(list(itertools.chain(*groups)), request.batch_size)
        for part, of_part in zip(mine, groups, strict=True):
            images = [to_uint8(images) for _, images in itertools.islice(drawn, len(of_part))]
            store.write(part, np.concatenate(images))
            yield

    drawn = make_missing(store, draw, 'images')
    peers.only_lead(store.finish)
    return drawn


def _check_settings(model: Model, request: Request) -> None:
    """Everything that cannot be drawn, before anything is."""
    diffusion: Mapping = model.config['diffusion']
    build_sampler(model.network, train_steps=diffusion['steps'], kind=diffusion['kind'], **request.settings())


def _say(request: Request) -> str:
    low, high = request.cfg_interval
    where = '' if (low, high) == (0, 1) else f' in {low:g}..{high:g}'
    return f'{request.method}, {request.steps} steps, cfg {request.cfg_scale:g}{where}'
