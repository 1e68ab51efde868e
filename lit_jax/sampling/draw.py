"""Draws what `sample.py` is asked for: a sheet (.png), a set (.npz) or a folder of PNG files.

    NAME.png       a row per class or prompt; two models side by side; for one prompt and seed just the image
    NAME.npz       a set of classes for evaluation
    FOLDER/        000012_class0207.png (image 12), or 00003_seed0.png (prompt 3, seed 0) with prompts.jsonl
    --geneval=DIR  DIR/00003/samples/0000.png: prompt 3 of DIR, the first seed

Interrupted sets and folders are resumed. All processes call these functions together: process 0 draws sheets,
all draw sets."""
import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from lit_jax.checkpoint.load import read_weights_config
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.metrics.geneval.geneval_folder import IMAGES, read_prompts
from lit_jax.models.arch import conditioning
from lit_jax.report.grids import make_sheet, save_png, to_uint8, viewable
from lit_jax.runtime import claim, cluster, memory, peers
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.runtime.options import given
from lit_jax.runtime.parts import make_missing
from lit_jax.runtime.paths import as_path, check_folder, explain_unreachable, prepare_file
from lit_jax.runtime.progress import format_seconds
from lit_jax.sampling.card import make_card
from lit_jax.sampling.decoder import check_comparable
from lit_jax.sampling.labels import choose_labels, parse_classes, shared_names
from lit_jax.sampling.model_pipeline import Pipeline, what_is_drawn
from lit_jax.sampling.pipelines import open_pipeline
from lit_jax.sampling.prompts import check_text, collect_prompts, parse_seeds, parse_size
from lit_jax.sampling.request import OF_CLASSES, OF_PROMPTS, SampleRequest
from lit_jax.sampling.stores import FolderStore, NpzStore, part_size

ROUND = 32       # images between two changes of networks with low_memory: the most that an interruption costs
PER_CLASS = 8    # of a sheet
_IMAGES = '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.png'


@dataclass(frozen=True)
class Plan:
    """A checked request that can be drawn."""
    pipeline: Pipeline
    settings: SamplerSettings
    shown: Sequence                                       # class or prompt of each image
    seeds: int | list[int]                                # one for all classes, or one per prompt image
    group: int                                            # images computed together
    shape: tuple[int, int]                                # (height, width) of the images in pixels
    negative: str = ''
    size: tuple[int, int] | None = None                   # the same, of prompts
    tile: int | None = None                               # of the VAE, of prompts
    batch_size: int = 0                                   # most images in flight, of classes
    rows: list[str] = field(default_factory=list)         # names of a sheet's rows
    columns: int = 1
    card: dict = field(default_factory=dict)              # everything that decides the bytes; {}: of a sheet
    names: list[str] = field(default_factory=list)        # files in a folder
    lines: list[dict] = field(default_factory=list)       # of its prompts.jsonl

    def __len__(self) -> int:
        return len(self.shown)

    def encode(self, wanted: Sequence[int]):
        """What to draw; wanted: numbers of the images that this process draws."""
        more = {'wanted': wanted} if self.pipeline.takes == 'text' else {}
        return self.pipeline.encode(self.shown, self.seeds, self.negative, **more)

    def draw_groups(self, images, groups: Sequence[int]):
        return self.pipeline.draw_groups(images, groups, self.settings, size=self.size, group=self.group,
                                         tile=self.tile, batch_size=self.batch_size)

    def describe(self) -> str:
        return f'{self.shape[1]}x{self.shape[0]}, {self.settings.describe()}'


def draw(request: SampleRequest) -> str:
    """Draws what is asked and returns a line about it. Raises UserError for a request that cannot be met."""
    if (request.source is None) == (request.compare is None):
        raise UserError('give one of --from (a model) and --grid_compare (two models)')
    if request.geneval and (request.prompt or request.prompts or request.out != SampleRequest.out):
        raise UserError('--geneval=DIR names the prompts and where their images go: leave --prompt, '
                        '--prompts and --out out')
    out = as_path(request.geneval or request.out)
    suffix = '' if request.geneval else out.suffix
    if suffix not in ('.png', '.npz') and re.fullmatch(r'\.[A-Za-z]+', suffix):
        meant = f' (did you mean {out.with_suffix(".png")}?)' if suffix.lower() in _IMAGES else ''
        raise UserError(f'--out {out}: {suffix} is not known{meant}; give NAME.png (a grid), NAME.npz (a set '
                        f'of classes, for evaluation) or a folder (single images)')
    if not request.geneval and out.name.lower() in ('.png', '.npz'):
        raise UserError(f'--out {out}: the file has no name; give NAME{out.name}')
    if request.compare and suffix != '.png':
        raise UserError(f'--grid_compare draws one image: --out {out} must end with .png')
    check_folder(out.parent if suffix else out, f'--out={out}')
    kind = _check_kind(request)
    options = {name: getattr(request, name) for name in ('dtype', 'text_dtype', 'low_memory')}
    pipelines = [open_pipeline(source, request.vae, request.text_encoder, **options)
                 for source in request.sources]
    check_comparable(pipelines)
    if request.classes and kind == 'label':      # by the names of whichever model knows them
        names = shared_names(pipelines, range(pipelines[0].network.null_label))
        request = replace(request, classes=','.join(map(str, parse_classes(request.classes, names))))
    settings = pipelines[-1].defaults.updated(request)      # one for both: they are compared
    plans = [plan_images(request, pipeline, sheet=suffix == '.png', settings=settings)
             for pipeline in pipelines]
    if kind == 'text':
        _say_memory(plans[0])
    elif len(plans) > 1:
        plans[0] = replace(plans[0], rows=shared_names(pipelines, plans[0].shown[::plans[0].columns]))
    began = time.perf_counter()
    if suffix == '.png':
        done = _draw_sheet(plans, out, request.sources)
    else:
        done, whole = _draw_set(plans[0], out, request)
        if whole:
            return done
    note = ' (latents in false colours: give --vae the folder of the VAE to decode them)' \
        if pipelines[0].false_colours else ''
    phases = f'; {pipelines[0].meter.summary()}' if kind == 'text' else ''
    return f'{done} {plans[0].describe()}, {format_seconds(time.perf_counter() - began)}{note}{phases}'


def _check_kind(request: SampleRequest) -> str:
    """What the model takes. Raises UserError for options of the other kind."""
    configs = peers.together(lambda: [read_weights_config(source) for source in request.sources])
    kind = 'text' if 'text' in [conditioning(config['model']) for config in configs] else 'label'
    if foreign := given(request, OF_CLASSES if kind == 'text' else OF_PROMPTS):
        instead = '--prompt="..."' if kind == 'text' else '--classes'
        raise UserError(f'{", ".join(foreign)}: not for {request.sources[0]}, which draws '
                        f'{what_is_drawn(kind)}: give it {instead}')
    return kind


def plan_images(request: SampleRequest, pipeline: Pipeline, sheet: bool = False,
                settings: SamplerSettings | None = None) -> Plan:
    """Checks everything that can be wrong; for a set also that all processes want the same."""
    if request.group is not None and request.group < 1 or request.batch_size < 0 or request.tile < 0:
        raise UserError(f'--group must be at least 1, --batch_size and --tile not negative, got '
                        f'{request.group}, {request.batch_size}, {request.tile}')
    settings = settings or pipeline.defaults.updated(request)
    if not sheet:
        pipeline.check_decodes()
    plan = (_plan_prompts if pipeline.takes == 'text' else _plan_classes)(request, pipeline, settings, sheet)
    if plan.card:
        cluster.check_same({'recipe card': plan.card, 'seeds': plan.seeds,
                            'out': str(request.geneval or request.out), **cluster.code_facts()})
    return plan


def _plan_classes(request: SampleRequest, pipeline, settings: SamplerSettings, sheet: bool) -> Plan:
    seed, = parse_seeds(request.seed, None)
    pipeline.check(settings)
    known = pipeline.network.null_label
    if sheet:
        if request.count is not None or request.labels is not None:
            raise UserError('a grid (.png) has --per_class images of each class of --classes; --count and '
                            '--labels are for sets: --out NAME.npz or a folder')
        columns = PER_CLASS if request.per_class is None else request.per_class
        if columns < 1:
            raise UserError(f'--per_class must be at least 1, got {columns}')
        classes = parse_classes(request.classes, pipeline.classes)
        labels = np.repeat(classes, columns)
        more = {'rows': pipeline.captions(classes), 'columns': columns}
    else:
        policy = request.labels or ('balanced' if request.count is None else 'random')
        classes = parse_classes(request.classes, pipeline.classes, most=None)
        labels = choose_labels(policy, classes, seed=seed, count=request.count, per_class=request.per_class)
        more = {'names': [f'{i:06d}_class{label:04d}.png' for i, label in enumerate(labels)]}
    group = pipeline.group(len(labels), group=request.group)
    if not sheet:
        decoding = pipeline.vae and {'dtype': np.dtype(pipeline.vae.network.dtype).name}
        images = {'count': len(labels), 'seed': seed, 'labels': policy,
                  'classes': 'all' if classes == list(range(known)) else classes}
        more['card'] = make_card(pipeline, settings, images, group=group, decoding=decoding or {})
    return Plan(pipeline, settings, labels, seed, group, pipeline.nominal_size,
                batch_size=request.batch_size, **more)


def _plan_prompts(request: SampleRequest, pipeline, settings: SamplerSettings, sheet: bool) -> Plan:
    if as_path(request.out).suffix == '.npz':
        raise UserError(f'--out {request.out}: .npz sets are of classes; images from prompts go to NAME.png '
                        f'or a folder')
    folders = peers.together(lambda: read_prompts(request.geneval)) if request.geneval else {}
    check_text('--negative_prompt', request.negative_prompt)
    texts = [one['prompt'] for one in folders.values()] or collect_prompts(request.prompt, request.prompts)
    seeds = parse_seeds(request.seed, request.seeds, range(IMAGES) if folders else (0,))
    size = None if request.size is None else parse_size(request.size)
    pipeline.check(settings, size)
    if request.tile and pipeline.vae is None:
        raise UserError(f'--tile {request.tile} is for the VAE: give --vae DIR, or leave it out')
    size, latent = size or pipeline.nominal_size, pipeline.latent_size(size)
    tile = request.tile or pipeline.default_tile(latent)
    if pipeline.vae is None or tile is not None and max(latent) <= tile:
        tile = None      # decoded whole: the recipe is one and the same
    group = pipeline.group(1, size, request.group)
    plan = Plan(pipeline, settings, [text for text in texts for _ in seeds], seeds * len(texts), group, size,
                request.negative_prompt, size, tile, rows=[text or '(no text)' for text in texts],
                columns=len(seeds))
    if sheet:
        return plan
    images = {'prompts': texts, 'negative_prompt': plan.negative, 'size': list(size),
              **({'seeds': seeds} if folders else {})}
    names = [f'{name}/samples/{column:04d}.png' for name in folders for column in range(len(seeds))] or [
        f'{number:05d}_seed{seed}.png' for number in range(len(texts)) for seed in seeds]
    lines = [{'file': name, 'prompt': text, 'negative_prompt': plan.negative, 'seed': seed, 'width': size[1],
              'height': size[0], **settings.to_json()}
             for name, text, seed in zip(names, plan.shown, plan.seeds, strict=True)]
    return replace(plan, names=names, lines=lines,
                   card=make_card(pipeline, settings, images, group=group, decoding={'tile': tile}))


def _say_memory(plan: Plan) -> None:
    if plan.pipeline.low_memory:
        estimates = plan.pipeline.estimate(plan.settings, plan.size, plan.group, plan.tile)
        memory.LOG.info('%s', memory.describe_estimate(estimates, low_memory=True))
    else:
        parts = ', '.join(f'{name.replace("_", " ")} {human_bytes(size)}'
                          for name, size in plan.pipeline.weights().items())
        memory.LOG.info('weights in memory: %s', parts)


def _draw_sheet(plans: Sequence[Plan], out, titles: Sequence[str]) -> str:
    """One image of all; of two models their grids side by side, from the same noise."""
    panels, first = [], plans[0]
    peers.only_lead(lambda: prepare_file(out))
    for plan in plans:
        mine = range(len(plan)) if peers.is_lead() else range(0)
        drawn = plan.draw_groups(plan.encode(mine), range(-(-len(mine) // plan.group)))
        peers.only_lead(lambda drawn=drawn: panels.append(viewable(np.concatenate(list(drawn)))))
        plan.pipeline.end_turn('vae')

    def save() -> None:
        save_png(out, lay_out(panels, titles, first.columns, first.rows, text=first.pipeline.takes == 'text'))

    peers.only_lead(save)
    return f'wrote {out}: {len(plans) * len(first)} images of'


def lay_out(panels: Sequence[np.ndarray], titles: Sequence[str], columns: int, rows: Sequence[str], *,
            text: bool) -> np.ndarray:
    """The sheet of what each model drew (uint8); of one image from a prompt the image itself."""
    scale = max(1, (64 if text else 32) // panels[0].shape[1])
    if text and len(panels) == len(panels[0]) == 1:
        return panels[0][0].repeat(scale, 0).repeat(scale, 1)
    named = list(zip([''] if len(panels) == 1 else titles, panels, strict=True))
    return make_sheet(named, columns, rows, scale=scale)


def _draw_set(plan: Plan, out, request: SampleRequest) -> tuple[str, bool]:
    """Draws or resumes an .npz or a folder of images, by all processes; (a line, whether it was whole)."""
    if out.suffix == '.npz':
        store = NpzStore(out, plan.card, plan.shown, plan.shape, part_size(plan.group))
    else:
        size = plan.group if plan.lines else part_size(plan.group)
        store = FolderStore(out, plan.card, plan.names, size, plan.lines, mixed=request.geneval is not None)
    with claim.claimed(out), explain_unreachable(out):
        lacking = peers.from_lead(store.begin)
        if lacking is None:
            return f'{store.describe()}; it was whole already, by the same recipe', True
        draw_parts(plan, store)
    return f'wrote {store.describe()}; {lacking:,} images now,', False


def draw_parts(plan: Plan, store) -> None:
    """Draws what a store (`lit_jax.sampling.stores`; its parts are whole groups) is missing; finishes it."""
    pipeline, group = plan.pipeline, plan.group
    spans = {part: store.span(part) for part in store.parts}
    groups_of = {part: range(span.start // group, -(-span.stop // group)) for part, span in spans.items()}
    most = -(-len(peers.from_lead(store.missing)) // jax.process_count())     # parts of one process
    if pipeline.takes == 'label':
        a_round = most
    else:
        images = max(ROUND, group) if pipeline.low_memory else group * len(jax.local_devices())
        a_round = max(1, images // store.size)

    def draw_mine(mine: list[int]):
        """All processes take as many rounds: they read weights together."""
        if not most:
            return
        images = plan.encode([image for part in mine for image in spans[part]])
        for start in range(0, most, a_round):
            parts = mine[start:start + a_round]
            drawn = plan.draw_groups(images, [number for part in parts for number in groups_of[part]])
            for part in parts:       # the next groups are in flight meanwhile
                blocks = [to_uint8(block) for block in itertools.islice(drawn, len(groups_of[part]))]
                store.write(part, np.concatenate(blocks))
                yield
            pipeline.end_turn('vae')

    make_missing(store, draw_mine, 'images')
    with cluster.peers_watched(lambda: 'finished parts are kept'):
        peers.only_lead(lambda: (claim.check(), store.finish()))
