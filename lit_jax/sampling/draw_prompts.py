"""What `sample.py` does for a model that takes prompts: a sheet, a folder of images, or the images of
GenEval.

    NAME.png       one image, or a sheet: a row for each prompt, a column for each seed
    FOLDER/        00003_seed0.png (prompt 3, seed 0), prompts.jsonl with a line for each, and the recipe,
                   card.json
    --geneval=DIR  DIR/00003/samples/0000.png: prompt 3 of DIR, the first seed

Folders are continued: what is there of the same recipe stays. Several processes deal the images of a folder
out among themselves; a sheet is drawn by process 0.
"""
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lit_jax.checkpoint.load import find_steps
from lit_jax.checkpoint.model_folder import is_model_folder
from lit_jax.metrics.geneval.geneval_folder import IMAGES, read_prompts
from lit_jax.report.grids import make_sheet, save_png, to_uint8, viewable
from lit_jax.runtime import cluster, memory, peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, explain_unreachable, files_under, write_text_atomic
from lit_jax.runtime.progress import Progress, format_seconds
from lit_jax.runtime.storage import MANIFEST
from lit_jax.sampling import prompts
from lit_jax.sampling.card import FORMAT, UINT8, card_text, check_same_card, computation, read_card
from lit_jax.sampling.text_to_image import PromptFeatures, TextToImage, open_text_to_image

# images between two changes of networks with --low_memory: what a kill can cost at most
ROUND = 32
REPORT_SECONDS = 10
CARD, LIST = 'card.json', 'prompts.jsonl'


@dataclass(frozen=True)
class PromptRequest:
    """The flags of `sample.py` for models that take prompts; it explains them. tile 0: the default."""
    source: str
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    negative_prompt: str = ''
    text_encoder: str | None = None
    vae: str | None = None
    out: str | None = None
    geneval: str | None = None
    seed: int | None = None
    seeds: str | None = None
    size: str | None = None
    method: str = 'dpm++'
    steps: int = 20
    eta: float = 0.0
    cfg_scale: float = 4.5
    cfg_channels: int | str = 'all'
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    dtype: str = 'float32'
    text_dtype: str | None = None
    group: int | None = None
    tile: int = 0
    low_memory: bool = False

    def settings(self) -> dict:
        """The options of `build_sampler` that a person chooses."""
        return {'method': self.method, 'steps': self.steps, 'eta': self.eta, 'cfg_scale': self.cfg_scale,
                'cfg_channels': self.cfg_channels, 'cfg_interval': tuple(self.cfg_interval)}


@dataclass(frozen=True)
class Job:
    """One image. number: of its prompt. name: of its file in the folder, None on a sheet."""
    number: int
    seed: int
    name: str | None = None


@dataclass(frozen=True)
class Plan:
    """A command that was checked. size: (height, width) in pixels."""
    request: PromptRequest
    pipeline: TextToImage
    texts: list[str]
    seeds: list[int]
    jobs: list[Job]
    size: tuple[int, int]
    latent: tuple[int, int]
    group: int
    tile: int | None


def draw_prompts(request: PromptRequest) -> str:
    """Does what is asked and returns one line about it. Raises UserError for a request that cannot be met."""
    plan = plan_prompts(request)
    _say_memory(plan)
    meter, started = memory.Meter(), time.perf_counter()
    what = _draw_sheet(plan, meter) if plan.jobs[0].name is None else _draw_folder(plan, meter)
    if not meter.phases:
        return what
    return (f'{what}, {_say(request, plan.size)}, {format_seconds(time.perf_counter() - started)}; '
            f'{meter.summary()}')


def plan_prompts(request: PromptRequest) -> Plan:
    """Everything that can be wrong is looked at, before weights are read; all processes call it."""
    if request.geneval is not None and (request.prompt or request.prompts or request.out):
        raise UserError('--geneval=DIR names the prompts and where their images go: leave --prompt, '
                        '--prompts and --out out')
    if request.group is not None and request.group < 1 or request.tile < 0:
        raise UserError(f'--group must be at least 1 and --tile not negative, got {request.group}, '
                        f'{request.tile}')
    _check_out(request)
    if request.geneval is not None:
        wanted = peers.together(lambda: read_prompts(request.geneval))
        names, texts = list(wanted), [one['prompt'] for one in wanted.values()]
        seeds = prompts.parse_seeds(request.seed, request.seeds, range(IMAGES))
    else:
        names, texts = [], prompts.collect_prompts(request.prompt, request.prompts)
        seeds = prompts.parse_seeds(request.seed, request.seeds)
    size = None if request.size is None else prompts.parse_size(request.size)
    step = peers.together(lambda: _newest_step(request.source))
    pipeline = open_text_to_image(request.source, request.text_encoder, request.vae, dtype=request.dtype,
                                  text_dtype=request.text_dtype, low_memory=request.low_memory, step=step)
    pipeline.check(size, **request.settings())
    size = size or pipeline.nominal_size
    latent = prompts.latent_size(size, pipeline.config['model'], pipeline.downscale)
    if request.tile and pipeline.vae is None:
        raise UserError(f'--tile {request.tile} is for the VAE: give --vae DIR, or leave it out')
    tile = request.tile or pipeline.default_tile(latent)
    # decoded whole: the recipe is one and the same
    if pipeline.vae is None or tile is not None and max(latent) <= tile:
        tile = None
    jobs = [Job(number, seed, _name(request, names, number, seed, column)) for number in range(len(texts))
            for column, seed in enumerate(seeds)]
    _check_decodes(request, pipeline)
    return Plan(request, pipeline, texts, seeds, jobs, size, latent,
                request.group or prompts.default_group(latent), tile)


def _newest_step(source) -> int | None:
    """The checkpoint of a workdir, None for a model folder: part of the card, so it is chosen first."""
    if is_model_folder(as_path(source)) or not as_path(source).exists():
        return None
    return max(find_steps(source), default=None)


def _check_out(request: PromptRequest) -> None:
    suffix = as_path(request.out or '').suffix
    if suffix == '.npz':
        raise UserError(f'--out {request.out}: .npz sets are of classes; images from prompts go to NAME.png '
                        f'or a folder')
    if suffix and suffix != '.png' and suffix[1:].isalpha():
        raise UserError(f'--out {request.out}: {suffix} is not known; give NAME.png or a folder')


def _check_decodes(request: PromptRequest, pipeline: TextToImage) -> None:
    latents = pipeline.config['latent']['space'] != 'pixels' and pipeline.vae is None
    if latents and not _is_sheet(request):
        raise UserError(f'{request.source} draws latents; images for a folder need the VAE that decodes '
                        f'them: --vae DIR (id {pipeline.config["latent"]["vae"]!r}; python '
                        f'convert_torch_ckpt.py DIFFUSERS_VAE --out DIR)')


def _is_sheet(request: PromptRequest) -> bool:
    return request.geneval is None and as_path(request.out or 'grid.png').suffix == '.png'


def _name(request: PromptRequest, names: Sequence[str], number: int, seed: int, column: int) -> str | None:
    if request.geneval is not None:
        return f'{names[number]}/samples/{column:04d}.png'
    return None if _is_sheet(request) else f'{number:05d}_seed{seed}.png'


# ------------------------------------------------------------------------------------------------------
# Outputs


def _draw_sheet(plan: Plan, meter: memory.Meter) -> str:
    request, out = plan.request, plan.request.out or 'grid.png'
    mine = plan.jobs if peers.is_lead() else []
    drawn: dict[Job, np.ndarray] = {}
    _draw_jobs(plan, mine, len(plan.jobs),
               lambda job, image: drawn.__setitem__(job, viewable(image[None])[0]), meter)

    def save() -> None:
        images = np.stack([drawn[job] for job in plan.jobs])
        scale = max(1, 64 // images.shape[1])
        if len(images) == 1:
            save_png(out, images[0].repeat(scale, 0).repeat(scale, 1))
        else:
            save_png(out, make_sheet([('', images)], len(plan.seeds),
                                     [text or '(no text)' for text in plan.texts], scale=scale))

    peers.only_lead(save)
    false_colours = plan.pipeline.config['latent']['space'] != 'pixels' and plan.pipeline.vae is None
    note = ' (latents in false colours: give --vae the folder of the VAE to decode them)' if false_colours \
        else ''
    return f'wrote {out}: {len(plan.texts)} prompts, {len(plan.seeds)} seeds of each{note}' if len(
        plan.jobs) > 1 else \
        f'wrote {out}: seed {plan.seeds[0]}{note}, {request.source}'


def _draw_folder(plan: Plan, meter: memory.Meter) -> str:
    root = as_path(plan.request.geneval or plan.request.out)
    card = make_card(plan)
    cluster.check_same({'recipe card': card, 'seeds': plan.seeds, 'out': str(root), **cluster.code_facts()})
    missing = peers.from_lead(lambda: _begin(plan, root, card))
    jobs = [plan.jobs[i] for i in missing]
    if not jobs:
        return f'{root}: {len(plan.jobs)} images; they were there already, by the same recipe'
    index, processes = cluster.process()
    with cluster.peers_watched(lambda: 'the images that are drawn stay'), explain_unreachable(root):
        _draw_jobs(plan, jobs[index::processes], -(-len(jobs) // processes),
                   lambda job, image: save_png(root / job.name, to_uint8(image)), meter)
    return f'wrote {len(jobs)} images to {root}, {len(plan.jobs)} in all, recipe in {CARD}'


def _begin(plan: Plan, root, card: dict) -> list[int]:
    """Makes room, and returns the places in `plan.jobs` of the images that are not there. Refuses another
    recipe's folder."""
    if root.exists() and not root.is_dir():
        raise UserError(f'{root} is a file; images go into a folder. Give another --out.')
    there = files_under(root) if root.exists() else {}
    if (begun := read_card(root / CARD)) is not None:
        check_same_card(begun, card, root)
    elif found := [name for name in there if plan.request.geneval is None or name.endswith('.png')]:
        raise UserError(f'{root} has files ({found[0]}), and no {CARD} says what they are. Give another '
                        f'folder, or empty it.')
    root.mkdir(parents=True, exist_ok=True)
    write_text_atomic(root / CARD, card_text(card))
    _write_list(plan, root)
    for folder in {as_path(root / job.name).parent for job in plan.jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    return [place for place, job in enumerate(plan.jobs) if job.name not in there]


def _write_list(plan: Plan, root) -> None:
    """One line an image; those of seeds that an earlier command drew stay."""
    lines = {}
    if (root / LIST).is_file():
        old = [json.loads(line) for line in (root / LIST).read_text(encoding='utf-8').splitlines()]
        lines = {line['file']: line for line in old}
    for job in plan.jobs:
        lines[job.name] = {'file': job.name, 'prompt': plan.texts[job.number],
                           'negative_prompt': plan.request.negative_prompt,
                           'seed': job.seed, 'width': plan.size[1], 'height': plan.size[0],
                           **plan.request.settings()}
    write_text_atomic(root / LIST,
                      ''.join(json.dumps(lines[name], ensure_ascii=False) + '\n' for name in sorted(lines)))


def make_card(plan: Plan) -> dict:
    """Everything that decides the bytes of the images but their seed, JSON-able."""
    pipeline, request = plan.pipeline, plan.request
    config, vae, text = pipeline.config, pipeline.vae, pipeline.text_config
    return json.loads(json.dumps({
        'format': FORMAT, 'kind': 'pictures',
        'model': {'weights': _weights_sum(request.source, pipeline), 'architecture': config['model'],
                  'diffusion': config['diffusion'], 'latent': config['latent']},
        'sampler': request.settings(),
        'text_encoder': {'id': text['id'], 'sha256': text['provenance']['sha256'], 'weights': text['weights'],
                         'dtype': pipeline.text_dtype},
        'vae': None if vae is None else {'id': vae.id, 'sha256': vae.sha256, 'scale': vae.scale,
                                         'shift': vae.shift, 'tile': plan.tile},
        'pictures': {'prompts': plan.texts, 'negative_prompt': request.negative_prompt,
                     'size': list(plan.size), 'uint8': UINT8,
                     **({'seeds': plan.seeds} if request.geneval else {})},
        'computed': computation(request.dtype, plan.group),
    }))


def _weights_sum(source, pipeline: TextToImage) -> dict:
    """What tells these weights from others without reading them: a model folder's list of checksums, a
    workdir's step."""
    manifest = as_path(source) / MANIFEST
    if manifest.is_file():
        return {'manifest_sha256': hashlib.sha256(manifest.read_bytes()).hexdigest()}
    return {'workdir': str(source), 'step': pipeline.step}


# ------------------------------------------------------------------------------------------------------
# Drawing


def _draw_jobs(plan: Plan, mine: list[Job], most: int, keep: Callable[[Job, np.ndarray], None],
               meter: memory.Meter) -> None:
    """Draws this process's images and gives each to `keep`, float32 [H, W, C].

    most: images of the process that has most. Weights are read by all processes together, and those that have
    nothing to do read along.
    """
    pipeline, request = plan.pipeline, plan.request
    numbers = sorted({job.number for job in mine})
    with meter.phase('text encoder') as phase:
        phase.weights = pipeline.load('text_encoder')
        features = peers.together(lambda: _encode(pipeline, [plan.texts[number] for number in numbers],
                                                  request.negative_prompt))
    rows = {number: row for row, number in enumerate(numbers)}
    a_round = max(ROUND, plan.group) if request.low_memory else plan.group * len(jax.local_devices())
    waves = sum(-(-len(mine[start:start + a_round]) // plan.group) for start in range(0, len(mine), a_round))
    with Progress(max(1, waves * request.steps), 'steps', seconds=REPORT_SECONDS) as progress:
        for start in range(0, most, a_round):
            jobs = mine[start:start + a_round]
            with meter.phase('backbone') as phase:
                phase.weights = pipeline.load('model')
                latents = peers.together(lambda jobs=jobs: _draw(plan, features, jobs, rows, progress))
            with meter.phase('decoder') as phase:
                phase.weights = pipeline.load('vae')
                peers.together(lambda jobs=jobs, latents=latents: _keep(plan, jobs, latents, keep))


def _encode(pipeline: TextToImage, texts: list[str], negative: str) -> PromptFeatures | None:
    if texts:
        return pipeline.encode(texts, negative)
    pipeline.give_up('text_encoder')
    return None


def _draw(plan: Plan, features: PromptFeatures | None, jobs: list[Job], rows: dict[int, int],
          progress: Progress) -> np.ndarray | None:
    if not jobs:
        plan.pipeline.give_up('model')
        return None
    seen = [0]

    def on_step(done: int, total: int) -> None:
        # Devices without a group of their own repeat another's: they do not count.
        wanted = done * -(-len(jobs) // plan.group) * plan.request.steps // total
        if wanted > seen[0]:
            progress.add(wanted - seen[0])
            seen[0] = wanted

    return plan.pipeline.draw(features, [job.seed for job in jobs], [rows[job.number] for job in jobs],
                              size=plan.size, group=plan.group, on_step=on_step, **plan.request.settings())


def _keep(plan: Plan, jobs: list[Job], latents: np.ndarray | None,
          keep: Callable[[Job, np.ndarray], None]) -> None:
    # one at a time: images are large, and low_memory holds the latents only
    for place, job in enumerate(jobs):
        keep(job, plan.pipeline.decode(latents[place:place + 1], tile=plan.tile,
                                       last=place == len(jobs) - 1)[0])
    if not jobs:
        plan.pipeline.give_up('vae')


def _say_memory(plan: Plan) -> None:
    pipeline = plan.pipeline
    if plan.request.low_memory:
        estimates = pipeline.estimate(plan.size, plan.group, plan.tile, **plan.request.settings())
        memory.LOG.info('%s', memory.describe_estimate(estimates, low_memory=True))
    else:
        parts = ', '.join(f'{name.replace("_", " ")} {memory.human_bytes(size)}'
                          for name, size in pipeline.weights().items())
        memory.LOG.info('weights in memory: %s', parts)


def _say(request: PromptRequest, size: tuple[int, int]) -> str:
    low, high = request.cfg_interval
    where = '' if (low, high) == (0, 1) else f' in {low:g}..{high:g}'
    return f'{size[1]}x{size[0]}, {request.method}, {request.steps} steps, cfg {request.cfg_scale:g}{where}'
