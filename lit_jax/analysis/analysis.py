"""Analyzes a model into a folder: analysis.json, PNG figures, report.html (`analyze.py`)."""
import json
import logging
import math
import time
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from lit_jax.analysis.analysis_report import write_page
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.analysis.examples import Images, data_recipe, open_images
from lit_jax.analysis.layer_errors import layer_errors, why_not_comparable
from lit_jax.analysis.losses import loss_by_time
from lit_jax.analysis.maps import Attention, NoMaps
from lit_jax.analysis.measures import spread
from lit_jax.analysis.routing_shares import route_names, routing
from lit_jax.analysis.survey import survey
from lit_jax.analysis.tokens import parse_layers, parse_token, token_maps
from lit_jax.checkpoint.load import load
from lit_jax.diffusion.kinds import Diffusion, read_diffusion
from lit_jax.models.network import Model
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, check_folder, prepare_folder, write_text_atomic
from lit_jax.runtime.progress import Progress, format_seconds
from lit_jax.sampling.noise import check_seed
from lit_jax.training.setup import check_same_task

LOG = logging.getLogger('lit_jax')
MOST_LAYERS = 4      # of the token maps, without --layers
_OF_MAPS = {'similarity', 'tokens', 'rank'}


def analyze(request: AnalyzeOptions) -> str:
    """Writes the analysis; returns a summary for people. Checks the request before it computes anything."""
    began = time.perf_counter()
    parts, out = request.chosen(), _check_out(request.out)
    _check_numbers(request)
    if request.linearize:
        from lit_jax.analysis.linearize import linearize
        return linearize(request, out)
    model = load(request.source, dtype=request.dtype)
    if model.network.conditioning != 'label':
        raise UserError(f'{request.source} is a text-to-image model; analyze.py takes models with class '
                        f'labels. To draw with it: python sample.py --from={request.source} --prompt=...')
    recipe = data_recipe(model, request.source, request.data, request.data_path, request.vae)
    models, sources = {'model': model}, {'model': request.source}
    if teacher_path := _teacher_path(model, recipe, request):
        models = {'student': model, 'teacher': load(teacher_path, dtype=request.dtype)}
        sources = {'student': request.source, 'teacher': teacher_path}
        check_same_task('teacher', teacher_path, models['teacher'].config, recipe)
    attentions = _attentions(request, models, sources) if {*parts} & _OF_MAPS else {}
    if not attentions:
        parts = [part for part in parts if part not in _OF_MAPS]
    token_layers = {name: parse_layers(request.layers, one.depth, one.name, MOST_LAYERS)
                    for name, one in attentions.items()}
    tokens = {name: parse_token(request.token, one.grid) for name, one in attentions.items()}
    diffusion = read_diffusion(recipe.diffusion)
    at = _time(request, diffusion)
    images = open_images(model, recipe, request.images, split=request.split, seed=request.seed)
    if request.image >= len(images):
        raise UserError(f'--image={request.image}: there are {len(images)} images (--images); give 0 to '
                        f'{len(images) - 1}')
    parts = [part for part in parts if _is_possible(part, request, models)]
    prepare_folder(out)

    known = (one.config.get('classes') for one in models.values())
    found = {'classes': next(filter(None, known), None),
             'models': {name: {'source': sources[name], 'step': one.config['provenance'].get('step'),
                               'model': one.arch} for name, one in models.items()},
             'diffusion': diffusion.to_json(),
             'data': {'name': recipe.data.name, 'path': recipe.data.path, 'split': request.split,
                      'seed': request.seed, 'pictures': len(images)}}
    if wanted := [part for part in ('similarity', 'rank') if part in parts]:
        found |= _survey_models(request, wanted, attentions, images)
    if 'tokens' in parts:
        found['tokens'] = {'picture': request.image, 'timestep': at, **{
            name: {'token': tokens[name], 'grid': one.grid,
                   **token_maps(one, images, request.image, at, tokens[name], token_layers[name])}
            for name, one in attentions.items()}}
    if 'loss' in parts:
        times = diffusion.spread_times(request.loss_timesteps)
        with Progress(len(times) * len(images), 'losses') as progress:
            found['loss'] = {'timesteps': times,
                             **loss_by_time(models, images, times, request.batch_size, progress)}
    if 'alignment' in parts:
        found |= _compare_layers(request, models, images)
    if 'routing' in parts:
        found |= _route_models(request, models, images, at)
    names = write_page(out, found, images)
    write_text_atomic(out / 'analysis.json', json.dumps(plain(found), indent=1) + '\n')
    return '\n'.join([*summary(found), f'wrote {out}: report.html, analysis.json, {", ".join(names)}; '
                                       f'{format_seconds(time.perf_counter() - began)}'])


def _attentions(request: AnalyzeOptions, models: Mapping[str, Model],
                sources: Mapping[str, str]) -> dict[str, Attention]:
    """The models that have attention maps. NoMaps for one that has none, if its maps were asked for by
    name."""
    found = {}
    for name, one in models.items():
        try:
            found[name] = Attention(one, f'the {name} {sources[name]}', int(request.memory * 2 ** 30))
        except NoMaps as error:
            if request.parts != 'all':
                raise
            LOG.warning('%s. Its maps are left out here', str(error).partition('. Analyze')[0])
    return found


def _survey_models(request: AnalyzeOptions, wanted: list[str], attentions: Mapping[str, Attention],
                   images: Images) -> dict:
    some = images[spread(len(images), request.map_images)]
    times = images.diffusion.spread_times(request.timesteps)
    with Progress(len(attentions) * len(times) * len(some), 'images of maps') as progress:
        surveys = {name: survey(one, some, times, wanted, progress) for name, one in attentions.items()}
    found = {part: {name: one[part] for name, one in surveys.items() if part in one} for part in wanted}
    if 'similarity' in found:
        found['similarity'] |= {'timesteps': times, 'pictures': len(some)}
    return {part: of_models for part, of_models in found.items() if of_models}


def _is_possible(part: str, request: AnalyzeOptions, models: Mapping[str, Model]) -> bool:
    """Whether these models have a part; UserError where they have not and it was asked for by name."""
    reason = why_not_comparable(models) if part == 'alignment' else ''
    if part == 'routing' and not any(map(route_names, models.values())):
        reason = f'no mixer of {" and ".join(models)} routes tokens; leave routing out'
    if reason and request.parts != 'all':
        raise UserError(f'--parts={request.parts}: {reason}')
    return not reason


def _compare_layers(request: AnalyzeOptions, models: Mapping[str, Model], images: Images) -> dict:
    times = images.diffusion.spread_times(request.timesteps)
    with Progress(len(times) * len(images), 'images of layers') as progress:
        return {'alignment': layer_errors(models, images, times, request.batch_size, progress)}


def _route_models(request: AnalyzeOptions, models: Mapping[str, Model], images: Images, at: float) -> dict:
    routed = {name: names for name, model in models.items() if (names := route_names(model))}
    with Progress(len(routed) * len(images), 'routed images') as progress:
        found = {name: routing(models[name], names, images, at, request.batch_size, progress)
                 for name, names in routed.items()}
    return {'routing': {'timestep': at, **found}}


def _teacher_path(model: Model, recipe: ConfigDict, request: AnalyzeOptions) -> str:
    """The path given, else that of the workdir's recipe; '' for none, or if the recipe's does not exist."""
    if request.teacher is not None or 'recipe' not in model.config:
        return request.teacher or ''
    path = recipe.teacher.path
    if path and not as_path(path).exists():
        LOG.warning('the teacher of this run, %s, does not exist: the student is analyzed alone '
                    '(--teacher=PATH)', path)
        return ''
    return path


def _check_numbers(request: AnalyzeOptions) -> None:
    for field, least in (('images', 1), ('map_images', 1), ('timesteps', 1), ('loss_timesteps', 2),
                         ('image', 0), ('batch_size', 1)):
        if getattr(request, field) < least:
            raise UserError(f'--{field} must be at least {least}, got {getattr(request, field)}')
    if not request.memory > 0:
        raise UserError(f'--memory is in GiB and must be above 0, got {request.memory}')
    check_seed(request.seed)


def _time(request: AnalyzeOptions, diffusion: Diffusion) -> float:
    if request.timestep is None:
        return diffusion.time_of_noise(0.25)
    return diffusion.check_time('--timestep', request.timestep)


def _check_out(out: str):
    """The output folder. UserError for a file, or a model folder or workdir, whose report would be lost."""
    path = as_path(out)
    check_folder(path, f'--out={out}')
    if (path / 'config.json').exists():
        raise UserError(f'--out={out} is the folder of a model or a run; give another one, such as '
                        f'{path / "analysis"}')
    return path


def summary(found: Mapping) -> list[str]:
    """The main results, one line per part."""
    names, lines = list(found['models']), []

    def add(title: str, values: Mapping, form: str) -> None:
        if values:
            lines.append(f'{title}: ' + ', '.join(f'{name} {value:{form}}' for name, value in values.items()))

    if 'similarity' in found:
        add('cosine similarity of heads', {
            name: np.nanmean(np.array(found['similarity'][name]['cosine']))
            for name in names if found['similarity'].get(name, {}).get('heads', 1) > 1}, '.3f')
    if 'rank' in found:
        ranks = {name: found['rank'][name] for name in names if name in found['rank']}
        add(f'effective rank of {max(one["tokens"] for one in ranks.values())}', {
            f'{name}{label}': np.mean(one[key]['effective']) for name, one in ranks.items()
            for key, label in (('map', ''), ('with_convolution', ' with convolution')) if key in one}, '.2f')
    if 'loss' in found:
        add(f'loss, mean over {read_diffusion(found["diffusion"]).unit}s', {
            f'{name} {term}': np.mean(values['mean']) for name in names
            for term, values in found['loss'][name].items()}, '.4f')
    if 'alignment' in found:
        lines.append(f'relative error by layer, mean: {np.mean(found["alignment"]["error"]):.4f}')
    return lines


def plain(value):
    """`value` for JSON: arrays become lists, and numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(np.round(value.astype(np.float64), 7).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
