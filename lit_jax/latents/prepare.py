"""Encodes images, or what a teacher draws, to cached latents (`prepare_latents.py`).

The data set is divided into shards of consecutive examples, and the missing shards among the processes. A
shard is written whole or not at all, so an interrupted run resumes with the missing shards, and ends with the
same files as an uninterrupted one.
"""
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Callable, Iterable

import jax
import numpy as np

import lit_jax
from lit_jax.checkpoint.identity import IN_FILES
from lit_jax.checkpoint.text_encoder_folder import read_text_encoder_config
from lit_jax.checkpoint.vae_folder import load_vae, read_vae_config
from lit_jax.data import caption_latents, crop, latent_shards, text_features
from lit_jax.data.images import ImageSource, as_told
from lit_jax.data.latents import BAD, DTYPES, FORMAT, KIND, METADATA, PREPARATION, SHARDS, record_bytes
from lit_jax.data.sources import CAPTIONED, Source, open_captioned, open_source
from lit_jax.latents import caption_preparation, official_shards
from lit_jax.latents.encoding import CaptionRecords, LabelRecords, make_shards
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.latents.teacher_draws import Draws, check_no_teacher, open_draws
from lit_jax.models.network import DTYPES as COMPUTE_DTYPES
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime import claim, peers, storage
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.runtime.json_file import plain, read_json, sealed, unsealed
from lit_jax.runtime.paths import absolute, check_folder, explain_unreachable, make_folder, write_text_atomic
from lit_jax.runtime.progress import Progress
from lit_jax.text.tokenizer import Tokenizer

LOG = logging.getLogger('lit_jax')
_USUAL_STD = (0.5, 2.0)  # of scaled latents; diffusion models expect about 1


def prepare_latents(request: PrepareOptions) -> str:
    """Makes the missing latents, checks all, and returns a text for people. All processes call it together.

    Raises UserError for wrong flags, a folder in use, too little space, damaged images (strict)."""
    work = open_draws(request) if request.teacher else peers.together(lambda: _open(request))
    plan = work.plan
    out = absolute(request.out)
    check_folder(out, f'--out={request.out}')
    with claim.claimed(out, inside=True), explain_unreachable(out):
        peers.only_lead(lambda: _claim(out, plan, request.command()))
        peers.together(lambda: _check_claim(out, plan))
        missing, null = peers.from_lead(lambda: (_missing(out, work),
                                                 caption_preparation.needs_null(out, plan)))
        if isinstance(work, _Work):
            _encode(request, work, out, missing, null)
        else:
            if null and isinstance(work, Draws):
                work.make_null(out)
            if missing:
                work.make(out)
        _together(lambda: _verify(out, _mine(range(len(latent_shards.shard_ranges(plan))))))
        return peers.from_lead(lambda: _finish(out, plan))


def _encode(request: PrepareOptions, work: '_Work', out, missing: list[int], null: bool) -> None:
    """Makes the missing shards, and the features of the empty caption if `null`."""
    captions, plan = None, work.plan
    if 'text' in plan and (missing or null):
        captions = caption_preparation.caption_encoder(request)
    if null:
        peers.only_lead(lambda: caption_preparation.make_null(out, captions))
    if missing:
        vae, size = load_vae(request.vae, request.vae_dtype), request.batch_size
        records = (LabelRecords(vae, plan, size) if captions is None
                   else CaptionRecords(vae, captions, plan, size))
        _together(lambda: make_shards(work.source, records, plan, out, _mine(missing), strict=request.strict,
                                      threads=request.threads or os.cpu_count() or 1,
                                      record_size=work.record_size))


@dataclasses.dataclass(frozen=True)
class _Work:
    """The images, the plan, and about the bytes of a record."""
    source: Source
    plan: dict
    record_size: float


def _open(request: PrepareOptions) -> '_Work | official_shards.OfficialShards':
    """Opens and checks all inputs; writes nothing."""
    _check_request(request)
    if request.data == official_shards.NAME:
        return official_shards.open_official(request)
    config = read_vae_config(request.vae)
    where = {'split': request.split, 'data_dir': request.data_dir, 'path': request.path,
             'strict': request.strict}
    if request.data in CAPTIONED:
        text_config = read_text_encoder_config(request.text_encoder)
        tokenizer = Tokenizer.load(request.text_encoder)
        source = open_captioned(request.data, image_size=request.image_size, buckets=request.buckets,
                                multiple=VaeNetwork(config['vae']).downscale * request.patch, **where)
        plan = caption_preparation.make_caption_plan(request, _plan_of_images(request, config, source),
                                                     text_config, source)
        return _Work(source, plan, caption_preparation.caption_record_size(plan, source, tokenizer))
    source = open_source(request.data, image_size=request.image_size,
                         channels=config['vae']['image_channels'], num_classes=request.num_classes,
                         classes=request.classes, **where)
    plan = make_plan(request, config, source)
    return _Work(source, plan, record_bytes(plan))


def make_plan(request: PrepareOptions, config: dict, source: Source) -> dict:
    """The plan of a data set with labels, JSON-able: everything that the meaning of its records depends on.

    config: of the VAE folder."""
    images = isinstance(source, ImageSource)
    identity = source.content() if images else {'name': request.data, 'count': len(source),
                                                 'classes': source.spec.num_classes}
    return {'format': FORMAT, 'kind': KIND, **_plan_of_images(request, config, source),
            'crop': crop.RULE if images else 'none', 'classes': source.class_names,
            'source': {**identity, 'split': request.split}, 'dtype': request.dtype,
            'shard_size': request.shard_size or latent_shards.default_shard_size(len(source))}


def _plan_of_images(request: PrepareOptions, config: dict, source: Source) -> dict:
    network = VaeNetwork(config['vae'])
    size, downscale = source.spec.image_size, network.downscale
    if size % downscale:
        raise UserError(f'--image_size={size}: this VAE needs a multiple of {downscale}')
    return {'vae': {'id': config['id'], 'sha256': config['provenance']['sha256'], 'scale': config['scale'],
                    'shift': config['shift'], 'downscale': downscale, 'channels': network.channels,
                    'dtype': request.vae_dtype},
            'image_size': size, 'latent_size': size // downscale}


def make_metadata(plan: dict, notes: list[dict], null: bytes = b'') -> dict:
    """The content of metadata.json: plan, shards, counts, statistics of the unscaled latents, versions.

    null: the file of the empty caption's features."""
    shards = [{'name': latent_shards.shard_name(number), 'count': note['count'], 'bytes': note['bytes'],
               'sha256': note['sha256']} for number, note in enumerate(notes)]
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'array-record', 'numpy', 'pillow')}
    text = {'text': plan['text'] | caption_preparation.text_facts(notes, null)} if 'text' in plan else {}
    return {**plan, **text, 'count': sum(note['count'] for note in notes),
            'bad': sum(len(note['bad']) for note in notes),
            'stats': _statistics(notes, plan['vae']['scale']),
            'versions': {'lit_jax': lit_jax.__version__, **versions}, 'shards': shards}


def _statistics(notes: list[dict], scale: float) -> dict:
    """Of the posterior means: mean and std of each channel, and the std of all of them times the scale."""
    notes = [note for note in notes if note['count']]
    values = sum(note['values'] for note in notes)
    mean, square = (np.array([math.fsum(column)
                              for column in zip(*(note[key] for note in notes), strict=True)]) / values
                    for key in ('sums', 'squares'))
    spread = math.sqrt(max(0.0, square.mean() - mean.mean() ** 2))
    return {'mean': mean.tolist(), 'std': np.sqrt(np.maximum(0, square - mean ** 2)).tolist(),
            'scaled_std': scale * spread}


def _check_request(request: PrepareOptions) -> None:
    check_no_teacher(request)
    if request.dtype not in DTYPES:
        raise UserError(f'unknown --dtype={request.dtype}; known: {", ".join(DTYPES)}')
    if request.vae_dtype not in COMPUTE_DTYPES:
        raise UserError(f'unknown --vae_dtype={request.vae_dtype}; known: {", ".join(COMPUTE_DTYPES)}')
    for name in ('image_size', 'batch_size', 'shard_size', 'threads', 'caption_tokens', 'patch'):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f'--{name} must be at least 1, got {value}')
    if request.data == 'latents':
        raise UserError('--data=latents are latents already; give images: imagenet2012, tfds:NAME or folder')
    if request.data == caption_latents.KIND:
        raise UserError('--data=caption_latents are latents already; give images: --data=captions')
    caption_preparation.check_text_request(request)


def _claim(out, plan: dict, command: str) -> None:
    """Claims an empty folder, or one in which this data set was begun."""
    if (out / PREPARATION).exists():
        _check_claim(out, plan)
    else:
        _check_empty(out)
        make_folder(out / SHARDS)
        begun = json.dumps(sealed({'plan': plan, 'command': command}), indent=1)
        write_text_atomic(out / PREPARATION, begun + '\n')
    latent_shards.remove_partial(out)


def _check_empty(out) -> None:
    ours = SHARDS, claim.FILE, f'.{PREPARATION}.'      # left by a run that was killed before its first file
    there = [entry.name for entry in out.iterdir()] if out.is_dir() else []
    names = sorted(name for name in there if not name.startswith(ours))
    if names:
        raise UserError(f'{out} is not empty ({", ".join(names[:5])}) and was not begun by '
                        f'prepare_latents.py. Choose another folder')


def _check_claim(out, plan: dict) -> None:
    """Raises UserError, with all differences, if the folder was begun with another plan."""
    if not (out / PREPARATION).exists():
        raise UserError(f'{out / PREPARATION}, which process 0 wrote, is not visible on this host: --out '
                        f'must be a folder that all hosts share')
    try:
        old = unsealed(read_json(out / PREPARATION, {'plan': {'source?': {}}}), out / PREPARATION)['plan']
    except UserError as error:
        raise UserError(f'{error}. Delete the folder and start again') from error
    now = plain(plan)
    now['source'] = as_told(now['source'], old.get('source'))
    check_alike(_decisive(old), _decisive(now), 'there', 'now', f'{out} has other latents',
                'Choose another folder, or give the settings it was begun with')


def _decisive(plan: dict) -> dict:
    """The plan without what may change: where the teacher is kept, and in which files."""
    teacher = {name: value for name, value in plan.get('teacher', {}).items() if name not in IN_FILES}
    return plan | ({'teacher': teacher} if teacher else {})


def _verb(plan: dict) -> str:
    return 'draw' if 'teacher' in plan else 'take over' if 'mirrored' in plan else 'encode'


def _missing(out, work: '_Work | Draws | official_shards.OfficialShards') -> list[int]:
    """The shards to make, after a check of the free space. If there are any, metadata.json is deleted."""
    plan = work.plan
    ranges, missing = latent_shards.shard_ranges(plan), latent_shards.missing_shards(out, plan)
    images, all_images = sum(len(ranges[number]) for number in missing), plan['source']['count']
    size = 1.01 * images * work.record_size + (1 << 17) * len(missing)      # with ArrayRecord's overhead
    if missing:
        storage.check_free_space(out, size)
        (out / METADATA).unlink(missing_ok=True)
        LOG.info('%d images to %s%s: %s in %d shards of %s', images,
                 _verb(plan),
                 f' (of {all_images}, the others are done)' if images < all_images else '',
                 human_bytes(size), len(missing), out)
        LOG.info('if interrupted, the same command resumes')
    return missing


def _mine(numbers: Iterable[int]) -> list[int]:
    return list(numbers)[jax.process_index()::jax.process_count()]


def _together(act: Callable) -> None:
    """As `peers.together`, but logs a failure at once: others see it only after their own part."""
    def aloud():
        try:
            act()
        except (UserError, OSError, RuntimeError) as error:
            if jax.process_count() > 1:
                LOG.error('error: %s', error)
            raise
    peers.together(aloud)


def _verify(out, numbers: list[int]) -> None:
    """Reads these shards again, and discards damaged ones."""
    damaged = []
    with Progress(len(numbers), 'shards checked') as progress:
        for number in numbers:
            if reason := latent_shards.find_shard_damage(out, number):
                damaged.append(f'{latent_shards.shard_name(number)}: {reason}')
                latent_shards.discard_shard(out, number)
            progress.add(1)
    if damaged:
        (out / METADATA).unlink(missing_ok=True)
        raise UserError(f'{len(damaged)} shards of {out} are damaged:\n  ' + '\n  '.join(damaged[:10]) +
                        '\nThe disk may be failing. Start the same command again to make these shards again')


def _finish(out, plan: dict) -> str:
    """Writes metadata.json, which marks the data set as finished; returns a text for people."""
    notes = [latent_shards.read_note(out, number) for number in range(len(latent_shards.shard_ranges(plan)))]
    if not any(note['count'] for note in notes):
        raise UserError('none of the images can be decoded: there is nothing to train on')
    metadata = make_metadata(plan, notes, (out / text_features.NULL).read_bytes() if 'text' in plan else b'')
    claim.check()
    bad = [f'{name}\t{reason}' for note in notes for _, name, reason in note['bad']]
    if bad:
        write_text_atomic(out / BAD, '\n'.join(bad) + '\n')
    write_text_atomic(out / METADATA, json.dumps(sealed(metadata), indent=1) + '\n')
    stats = metadata['stats']
    if plan.get('space') != 'pixels' and not _USUAL_STD[0] <= stats['scaled_std'] <= _USUAL_STD[1]:
        LOG.warning('the latents times the scale %g of this VAE have a standard deviation of %.3g; diffusion '
                    'models expect about 1. Check the %s and its scale', plan['vae']['scale'],
                    stats['scaled_std'], 'teacher' if 'teacher' in plan else 'VAE')
    lines = [f'{out}: {metadata["count"]} images, {_beside(metadata)}, '
             f'{human_bytes(sum(note["bytes"] for note in notes))}, all shards checked',
             f'mean  {_numbers(stats["mean"])}', f'std   {_numbers(stats["std"])}; times the scale '
             f'{plan["vae"]["scale"]:g}, all channels: {stats["scaled_std"]:.3f}']
    if bad:
        lines.append(f'left out: {len(bad)} images that cannot be decoded, listed in {out / BAD}')
    return '\n'.join(lines)


def _beside(metadata: dict) -> str:
    drawn = ', drawn by ' + metadata['teacher']['name'] if 'teacher' in metadata else ''
    if 'text' not in metadata:
        return drawn.removeprefix(', ') or 'each with its mirror image'
    text = metadata['text']
    if text['truncated']:
        LOG.warning('%d of %d captions have more than %d tokens and were cut there (%s)', text['truncated'],
                    text['captions'], text['tokens'], 'as the teacher does' if drawn else '--caption_tokens')
    used = sum(count > 0 for count in metadata['bucket_counts'])
    return (f'{text["captions"]} captions of {text["mean_tokens"]:.1f} tokens (mean), {used} shapes used of '
            f'{len(metadata["buckets"])}{drawn}')


def _numbers(values: list[float]) -> str:
    return ' '.join(f'{value:.3f}' for value in values)
