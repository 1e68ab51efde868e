"""Draws the training set of a student with its teacher (`prepare_latents.py --teacher=MODEL --count=N`).

Image i has the noise of (seed, i) and shows class or prompt i mod n of those asked for. It is computed in
group i div G of the whole set, so its bits depend neither on the devices nor on what was drawn before an
interruption. What the model draws is stored as it is: exact latents (lit_jax/data/latents.py) or pixels."""
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lit_jax.checkpoint.identity import params_identity
from lit_jax.checkpoint.load import find_steps
from lit_jax.checkpoint.model_folder import is_model_folder
from lit_jax.data import caption_latents, latent_shards, latents, text_features
from lit_jax.data.latent_space import LatentSpace
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.latents.prepare_options import DRAWN, IMAGES, PrepareOptions
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import given
from lit_jax.runtime.parts import make_missing
from lit_jax.runtime.paths import as_path, explain_unwritable
from lit_jax.sampling.card import computed_facts
from lit_jax.sampling.labels import parse_classes
from lit_jax.sampling.model_pipeline import Pipeline
from lit_jax.sampling.noise import MAX_IMAGES, check_seed
from lit_jax.sampling.pipelines import find_part, open_pipeline
from lit_jax.sampling.prompts import read_prompts
from lit_jax.sampling.request import HOW
from lit_jax.text.tokenizer import Tokenizer

SOURCE = 'teacher'      # the source's name in the metadata of a drawn set
_ESTIMATED = 256        # prompts whose tokens give the size of a record


@dataclasses.dataclass(frozen=True)
class Draws:
    """A checked request. shown: classes (int32) or prompts that take turns. record_size: about the bytes."""
    pipeline: Pipeline
    settings: SamplerSettings
    shown: Sequence
    seed: int
    group: int
    plan: dict
    record_size: float
    tokenizer: Tokenizer | None = None

    def make(self, out) -> None:
        """Draws the missing shards into the folder `out`, divided among all processes."""
        self.pipeline.load('model')
        shards = latent_shards.ShardStore(out, self.plan)
        most = -(-len(peers.from_lead(shards.missing)) // jax.process_count())

        def draw_mine(mine: list[int]) -> Iterator[None]:
            for turn in range(most):      # all processes take as many turns: they encode prompts together
                self._make_shard(out, mine[turn] if turn < len(mine) else None)
                yield

        make_missing(shards, draw_mine, 'images')

    def make_null(self, out) -> None:
        """Writes the features of the empty caption; called by all processes together."""
        cond = self.pipeline.encode([''], self.seed).cond
        peers.only_lead(lambda: text_features.write_null(out, cond['null_text'][0],
                                                         cond['null_text_mask'][0]))

    def _make_shard(self, out, number: int | None) -> None:
        span = range(0) if number is None else latent_shards.shard_ranges(self.plan)[number]
        shown = [self.shown[i % len(self.shown)] for i in span]
        images = self.pipeline.encode(shown, self.seed, **({} if self.tokenizer is None else
                                                           {'wanted': range(len(shown))}))
        images = dataclasses.replace(images, numbers=np.arange(span.start, span.stop, dtype=np.uint32))
        # A full group at least: how many are computed together decides the bits.
        rows = np.resize(np.arange(len(shown)), max(len(shown), self.group) if shown else 0)
        groups = self.pipeline.draw_groups(images.take(rows), range(-(-len(shown) // self.group)),
                                           self.settings, group=self.group)
        if number is None:
            return
        drawn = np.concatenate(list(groups))[:len(shown)]
        self._check_values(drawn, span.start)
        with (explain_unwritable(out, self.record_size * len(span)),
              latent_shards.ShardWriter(out, number, self.plan) as writer):
            for data, values, facts in self._records(shown, images, drawn):
                writer.write(data, latents.exact_moments(values), **facts)
            writer.commit()

    def _records(self, shown: list, images, drawn: np.ndarray) -> Iterator[tuple[bytes, np.ndarray, dict]]:
        """(record, what was drawn, facts of the note) of each image."""
        dtype = self.plan['dtype']
        if self.tokenizer is None:
            for label, values in zip(shown, drawn, strict=True):
                yield latents.pack(values[None], label, dtype), values, {'labels': int(label)}
            return
        cut = set(self.tokenizer.encode(shown, self.plan['text']['tokens']).truncated)
        cond = images.rows(np.arange(len(shown)))['cond']
        for i, values in enumerate(drawn):
            tokens = text_features.count_tokens(cond['text_mask'][i])
            data = caption_latents.pack(values, 0, [cond['text'][i][:tokens]], dtype)
            yield data, values, {'buckets': 0, 'tokens': [tokens, 0], 'cut': int(i in cut)}

    def _check_values(self, drawn: np.ndarray, first: int) -> None:
        largest = float(np.finfo(latents.DTYPES[self.plan['dtype']]).max)
        kept = np.all(np.abs(drawn) <= largest, axis=(1, 2, 3))         # also false for NaN
        if not kept.all():
            raise UserError(f'the teacher draws NaN or more than {largest:.3g} for image '
                            f'{first + int(np.argmin(kept))}: give --teacher_dtype=float32 and '
                            f'--dtype=float32, or check the teacher')


def open_draws(request: PrepareOptions) -> Draws:
    """Opens and checks all inputs; writes nothing. All processes call it together."""
    seed = peers.together(lambda: _check_request(request))
    path = as_path(request.teacher)
    step = None
    if not peers.together(lambda: is_model_folder(path)):
        step = max(peers.from_lead(lambda: find_steps(path)), default=None)
    texts = {'text_dtype': request.text_dtype} if request.text_encoder else {}
    pipeline = open_pipeline(request.teacher, None, request.text_encoder or None, step=step,
                             dtype=request.teacher_dtype or 'float32', **texts)
    settings = pipeline.defaults.updated(request)
    shown, count = peers.together(lambda: _check_images(request, pipeline, settings))
    group = pipeline.group(count, group=request.group)
    plan = {**_make_plan(request, pipeline, count, group), 'teacher': params_identity(path, step),
            'drawn': {'seed': seed, **_shown_facts(pipeline, shown), 'sampler': settings.to_json(),
                      'computed': computed_facts(pipeline, group)}}
    if pipeline.takes == 'label':
        return Draws(pipeline, settings, shown, seed, group, plan, latents.record_bytes(plan))
    encoder = request.text_encoder or find_part(path, 'text_encoder')
    tokenizer = peers.together(lambda: Tokenizer.load(encoder))
    tokens = tokenizer.encode(shown[:_ESTIMATED], plan['text']['tokens']).mask.sum(1).mean()
    return Draws(pipeline, settings, shown, seed, group, plan,
                 caption_latents.record_bytes(plan, 0, float(tokens)), tokenizer)


def _check_request(request: PrepareOptions) -> int:
    """The seed. UserError for flags of the other kind and numbers out of range."""
    if foreign := given(request, IMAGES):
        raise UserError(f'{", ".join(foreign)}: for images that a VAE encodes, but --teacher='
                        f'{request.teacher} draws its latents; leave them out')
    if request.count is None and not request.prompts:
        raise UserError('--teacher needs --count=N, the number of images to draw')
    for name in ('count', 'group', 'shard_size'):
        value = getattr(request, name)
        if value is not None and not 1 <= value <= MAX_IMAGES:
            raise UserError(f'--{name} must be at least 1 and at most {MAX_IMAGES:,}, got {value}')
    seed = request.seed or 0
    check_seed(seed)
    return seed


def check_no_teacher(request: PrepareOptions) -> None:
    """UserError for flags that need --teacher, or without data."""
    flags = [*given(request, DRAWN), *given(request, HOW)]
    if flags:
        raise UserError(f'{", ".join(flags)}: for images that a teacher draws: give --teacher=MODEL, or '
                        f'leave them out')
    needed = ('data', 'vae', *(() if request.data == 'lightningdit' else ('image_size',)))
    if missing := [f'--{name}' for name in needed if not getattr(request, name)]:
        raise UserError(f'{", ".join(missing)} missing: give --data, --vae and --image_size (images that a '
                        f'VAE encodes), or --teacher=MODEL and --count=N (images that a model draws)')


def _check_images(request: PrepareOptions, pipeline: Pipeline,
                  settings: SamplerSettings) -> tuple[Sequence, int]:
    """(the classes or prompts that take turns, the number of images)."""
    rows, columns = pipeline.config['model']['input_size']
    if rows != columns:
        raise UserError(f'{request.teacher} draws {rows}x{columns}: recipes train on squares')
    pipeline.check(settings)
    if pipeline.takes == 'label':
        if request.prompts:
            raise UserError(f'--prompts: {request.teacher} draws classes: give --classes=3,7, or nothing for '
                            f'all of them')
        shown: Sequence = parse_classes(request.classes, pipeline.classes, most=None)
    else:
        if request.classes or not request.prompts:
            raise UserError(f'{request.teacher} draws what prompts say: give --prompts=FILE, one a line'
                            + (', and no --classes' if request.classes else ''))
        shown = read_prompts(request.prompts)
    count = request.count or len(shown)
    if count < len(shown):
        what, less = (('classes', 'some of them: --classes=3,7') if pipeline.takes == 'label' else
                      ('prompts', 'fewer prompts'))
        raise UserError(f'--count={count} images cannot show all {len(shown):,} {what}: give more, or {less}')
    return shown, count


def _make_plan(request: PrepareOptions, pipeline: Pipeline, count: int, group: int) -> dict:
    """What the records mean, JSON-able, as other cached latents say it."""
    space, arch = LatentSpace.of_model(pipeline.config), pipeline.config['model']
    side, downscale, text = arch['input_size'][0], pipeline.downscale or 8, pipeline.takes == 'text'
    size = request.shard_size or latent_shards.default_shard_size(count)
    if request.shard_size and size % group:
        raise UserError(f'--shard_size={size}: images are drawn in groups of {group}; give a multiple of it, '
                        f'such as {group * -(-size // group)}')
    plan = {'format': latents.EXACT_FORMAT, 'kind': caption_latents.KIND if text else latents.KIND,
            'space': space.space, 'exact': True,
            'vae': {'id': space.vae, 'sha256': None, 'scale': space.scale, 'shift': 0.0,
                    'downscale': downscale, 'channels': arch['channels']},
            'image_size': side * downscale, 'latent_size': side, 'crop': 'none',
            'classes': [] if text else pipeline.classes,
            'source': {'name': SOURCE, 'count': count, 'split': request.split}, 'dtype': request.dtype,
            'shard_size': group * -(-size // group)}                    # whole groups
    if not text:
        return plan
    encoder = pipeline.text_facts()
    return {**plan, 'buckets': [[side * downscale] * 2], 'bucket_counts': [count],
            'text': {'encoder': encoder['id'], 'sha256': encoder['sha256'], 'tokens': arch['caption_tokens'],
                     'width': arch['caption_channels'], 'dtype': text_features.DTYPE,
                     'weights': encoder['weights'], 'computed_in': encoder['dtype']}}


def _shown_facts(pipeline: Pipeline, shown: Sequence) -> dict:
    if pipeline.takes == 'label':
        return {'classes': 'all' if list(shown) == list(range(pipeline.network.null_label)) else list(shown)}
    return {'prompts': {'count': len(shown), 'sha256': hashlib.sha256('\n'.join(shown).encode()).hexdigest()}}
