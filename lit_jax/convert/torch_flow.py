"""What a PyTorch model predicts: noise (DiT), or the velocity of a flow (SiT, REPA, LightningDiT).

The files of DiT and SiT have the same tensors. They differ in what their trainers wrote beside them, in their
names, and in one fact: the second half of SiT's outputs has no loss, so it is still the zero that it started
from, where DiT's is a trained variance. Where nothing of this differs, the caller is asked."""
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lit_jax.convert.torch_files import FLOATS, Source
from lit_jax.diffusion.flow_paths import PATHS
from lit_jax.diffusion.kinds import Ddpm, Flow
from lit_jax.models.rotary import ROTARY
from lit_jax.runtime.errors import UserError, check_known, shown, shown_name

LOG = logging.getLogger('lit_jax')
PROJECTORS = 'projectors.'       # REPA's, from tokens to the features of another network
OUTPUT = 'final_layer.linear.weight'
OUTPUT_BIAS = 'final_layer.linear.bias'
DEAD = 'the second half of its outputs was never trained'
# How the systems train; REPA's time runs from the data to the noise.
SYSTEMS: Mapping[str, Ddpm | Flow] = {'dit': Ddpm(), 'sit': Flow(), 'repa': Flow(noise_at=1),
                                      'lightningdit': Flow(times='logit_normal', cosine=1.0)}
# What only LightningDiT has: rotary tables, and a norm with a gain.
_LIGHTNING = *ROTARY, 'final_layer.norm_final.weight', 'blocks.0.mlp.w12.weight'
_PREDICTIONS = {'v': 'velocity', 'velocity': 'velocity', 'noise': 'noise', 'score': 'score'}
_NOISE = 'noise', 'epsilon', 'eps'      # what a trainer of DiTs may say
_BLOCK, _LATE = re.compile(r'blocks\.(\d{1,4})\.'), re.compile(r'decoder_blocks\.(\d{1,4})\.(.+)')
_TIMES = {'uniform': 'uniform', 'lognormal': 'log_normal'}


def find_diffusion(source: Source, path: Path, asked: str | None = None) -> tuple[dict, str]:
    """(the section `diffusion` of a file, why: '' where the file's own words leave nothing open).

    asked: a name of SYSTEMS, or None. UserError where the file contradicts it, and where nothing tells."""
    if asked is not None:
        check_known('system', asked, SYSTEMS)
    join_blocks(source)
    if source.config and 'diffusion' in source.config and asked is None:
        return dict(source.config['diffusion']), ''
    found = next(_evidence(source, path), None)
    if asked and found and found[0] != asked:
        raise UserError(f'{path} is a {_name(found[0])} ({found[1]}), and was asked for as {_name(asked)}; '
                        f'leave --system out, or give the file that it belongs to')
    system, reason = found or _by_output(source, path, asked)
    if system == 'dit':
        return SYSTEMS['dit'].to_json(), '' if asked else 'as of DiT and PixArt'
    said = 'path_type' in source.told
    return _told_flow(source, path, system).to_json(), '' if said else f'as of {_name(system)}: {reason}'


def _name(system: str) -> str:
    return {'dit': 'DiT', 'sit': 'SiT', 'repa': 'REPA', 'lightningdit': 'LightningDiT'}[system]


def _evidence(source: Source, path: Path) -> Iterator[tuple[str, str]]:
    """(system, words for it), the surest first."""
    told = source.told
    if key := next((key for key in _LIGHTNING if key in source.tensors), None):
        yield 'lightningdit', f'it has {key}'
    if any(key.startswith(PROJECTORS) for key in source.tensors):
        yield 'repa', f'it has {PROJECTORS}*'
    for name in ('encoder_depth', 'enc_type'):
        if name in told:
            yield 'repa', f'it was trained with --{name.replace("_", "-")} {shown_name(told[name])}'
    for name in ('path_type', 'prediction'):
        if name in told and str(told[name]).lower() not in _NOISE:
            yield 'sit', f'it was trained with --{name.replace("_", "-")} {shown_name(told[name])}'
    for start, system in (('sit-', 'sit'), ('dit-', 'dit')):
        if str(told.get('model', '')).lower().startswith(start):
            yield system, f'its trainer calls it {shown_name(told["model"])}'
    if not source.config:
        for start, system in (('sit-', 'sit'), ('dit-', 'dit')):
            if path.name.lower().startswith(start):
                yield system, 'its name says so; rename it if it is not'


def _by_output(source: Source, path: Path, asked: str | None) -> tuple[str, str]:
    """(system, words for it): as asked, where the second half of the outputs allows it, or by it."""
    half = _half_of_output(source)
    if asked == 'dit' and half == 'sit':
        raise UserError(f'{path} was asked for as DiT, but {DEAD}, as SiT leaves it: a DiT predicts its '
                        f'variance there. Leave --system out, or say sit or repa')
    if asked not in (None, 'dit') and half == 'dit':
        LOG.warning('%s is taken for a %s, as asked, but the second half of its outputs was trained, as a '
                    'variance is: if it predicts noise, leave --system out', path, _name(asked))
    if not (asked or half):
        raise UserError(f'{path} gives as many channels as it takes, so nothing tells a DiT without '
                        f'variance, which predicts noise, from a SiT, which predicts a velocity: say '
                        f'--system dit, sit, repa or lightningdit')
    return (asked, 'as asked') if asked else (half, DEAD)


def _half_of_output(source: Source) -> str:
    """'dit' or 'sit' by the second half of the outputs, and by what else has no twin among the flows; ''
    where nothing tells."""
    weight, table = source.tensors.get(OUTPUT), source.tensors.get('x_embedder.proj.weight')
    if source.config or weight is None or table is None or len(table.shape) != 4 or len(weight.shape) != 2:
        return 'dit'      # our own, PixArt's or diffusers', of which no flow is read; or damaged, told later
    channels, outputs = table.shape[1], weight.shape[0]
    patch = table.shape[2] * table.shape[3]
    if outputs != 2 * channels * patch:
        return '' if any(key.startswith('y_embedder.embedding_table') for key in source.tensors) else 'dit'
    unused = np.arange(outputs) % (2 * channels) >= channels
    dead = all(key in source.tensors and not source.read(key)[unused].any() for key in (OUTPUT, OUTPUT_BIAS))
    live = source.read(OUTPUT).any()
    source.release()
    return 'sit' if dead and live else 'dit'


def _told_flow(source: Source, path: Path, system: str) -> Flow:
    """The flow that a trainer's command line describes; what it does not say is the system's."""
    told, usual = source.told, SYSTEMS[system]
    chosen = {'times': usual.times, 'cosine': usual.cosine, 'noise_at': usual.noise_at}
    for field, name, known in (('path', 'path_type', {name: name for name in PATHS}),
                               ('prediction', 'prediction', _PREDICTIONS), ('times', 'weighting', _TIMES)):
        if name in told:
            value = str(told[name]).lower()
            if value not in known:
                raise UserError(f'{path} was trained with --{name.replace("_", "-")} {shown(told[name])}, '
                                f'which this version does not know; known: {", ".join(known)}')
            chosen[field] = known[value]
    if 'use_lognorm' in told:      # LightningDiT
        chosen['times'] = 'logit_normal' if told['use_lognorm'] else 'uniform'
        chosen['cosine'] = 1.0 if told.get('use_cosine_loss') else 0.0
    weight = str(told.get('loss_weight', 'None')).lower()
    if weight != 'none' and chosen.get('prediction') in ('noise', 'score'):      # ignored with velocity (SiT)
        chosen['weighting'] = weight
    if chosen.get('prediction', 'velocity') != 'velocity':
        chosen['cosine'] = 0.0
    return Flow(**chosen)


def join_blocks(source: Source) -> None:
    """REPA's early files count the blocks behind the projectors anew: decoder_blocks.0 follows the last of
    blocks."""
    first = 1 + max((int(found[1]) for key in source.tensors if (found := _BLOCK.match(key))), default=-1)
    late = {key: _LATE.match(key) for key in source.tensors if key.startswith('decoder_blocks.')}
    source.rename({key: f'blocks.{first + int(found[1])}.{found[2]}' for key, found in late.items() if found})


def take_projectors(source: Source, path: Path | str) -> dict[str, np.ndarray]:
    """REPA's projectors, {key: float32 array}, which no longer count among the tensors of `source`: they do
    not feed the velocity. UserError for one that cannot be read."""
    found, problems = {}, []
    if source.config and source.config['model'].get('projectors'):
        return {}      # a model of ours, which trains them
    for key in [key for key in source.tensors if key.startswith(PROJECTORS)]:
        info = source.tensors.pop(key)
        if info.dtype not in FLOATS:
            problems.append(f'wrong dtype in tensor: {shown_name(key)} is {info.dtype}')
            continue
        found[key] = source.read(key)
        if not np.isfinite(found[key]).all():
            problems.append(f'non-finite values in tensor: {shown_name(key)}')
    numbers = sorted({key.split('.')[1] for key in found})
    wanted = {f'{PROJECTORS}{number}.{layer}.{kind}' for number in numbers for layer in (0, 2, 4)
              for kind in ('weight', 'bias')}
    problems += [f'missing tensor: {shown_name(key)}' for key in sorted(wanted - set(found))]
    problems += [f'unexpected tensor: {shown_name(key)}' for key in sorted(set(found) - wanted)]
    if problems:
        raise UserError(f'{path} does not hold whole projectors:\n  ' + '\n  '.join(problems[:40]))
    return found
