"""The workdir: which recipe, data and weights it belongs to, and the refusal to mix two. A local folder, or
one in a bucket (gs://...).

    config.json  checkpoints/000400000/  metrics.jsonl  samples/  inheritance.json  report.html
    null_caption.npy  (of a text model)

`check_workdir` and `claim_workdir` are called by all processes together; the other functions by any."""
import json
import os
import time
from collections.abc import Mapping

from lit_jax.checkpoint import null_caption
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.models.mixers import MIXERS
from lit_jax.recipes.recipe import default
from lit_jax.runtime import paths, peers
from lit_jax.runtime.differences import LINES, find_differences
from lit_jax.runtime.errors import UserError, listed, shown
from lit_jax.runtime.json_file import plain, read_json, sealed, unsealed

FORMAT = 1
_SHAPE = {'kind?': str, 'began?': float, 'recipe?': {str: object}, 'inputs?': {str: {}}}
CONFIG = 'config.json'
_FOLDERS = ('checkpoints', 'samples')
_FILES = (CONFIG, 'metrics.jsonl', 'inheritance.json', 'report.html', null_caption.FILE)
# What may differ when a run resumes: it changes neither the weights nor the data of the steps already done.
FREE_SECTIONS = ('mesh', 'log', 'checkpoint', 'sample', 'eval', 'published')
FREE_FIELDS = ('train.steps', 'train.scan_layers', 'train.remat', 'data.path', 'teacher.path', 'inherit.path')
# Paths of what else may lie elsewhere; workdirs of earlier versions do not say what it was.
KNOWN_FIELDS = ('data.classes', 'latent.vae_path', 'text.encoder_path')


def check_workdir(workdir, recipe: Mapping, inputs: Mapping | None = None, classes=None) -> None:
    """Raises UserError on all processes if the workdir is none, or belongs to another finalized recipe, or
    to other data or weights.

    inputs: {'data': identity, 'teacher': ...}, plain JSON. classes: names of the data's classes, if any.
    Both are compared if there are checkpoints of a version that stored them."""
    peers.only_lead(lambda: _check(paths.as_path(workdir), recipe, inputs, classes))


def _check(workdir, recipe: Mapping, inputs: Mapping | None, classes) -> None:
    paths.check_no_pattern(workdir)
    paths.check_reachable(workdir)
    _check_places(workdir)
    with paths.explain_unreachable(workdir):
        claimed, used = (workdir / CONFIG).exists(), (workdir / 'checkpoints').exists()
    if claimed:
        stored, now = read_workdir(workdir), plain(recipe)
        known = stored.get('inputs')
        was = _with_defaults(stored.get('recipe', {}), now, plain(default().to_dict()))
        for one in (was, now):
            one['diffusion'] = read_diffusion(one.get('diffusion') or {}).to_json()
            _complete_mixer(one)
        free = (*FREE_SECTIONS, *FREE_FIELDS, *(KNOWN_FIELDS if known else ()))
        fields = find_differences(_decisive(was, free), _decisive(now, free), 'there', 'in this recipe')
        others = []
        if known and inputs and used:
            others = find_differences(known, inputs, 'there', 'now') + _other_classes(stored, classes)
        if fields:
            raise UserError(f'{workdir} belongs to another recipe:{listed(fields + others, LINES)}\n'
                            'Give another --workdir, or the recipe that it was made with.')
        if others:
            raise UserError(f'{workdir} was trained with other data or weights:{listed(others, LINES)}\n'
                            'Give those again, wherever they lie now, or another --workdir. To train its '
                            f'weights on with these: --workdir=NEW --config.inherit.path={workdir} '
                            '--config.inherit.copy=all')
    elif used:
        raise UserError(f'{workdir} has checkpoints but no {CONFIG}; restore it or give another --workdir')


def _check_places(workdir) -> None:
    """Raises UserError if something else is where a run writes; later it would cost what was trained."""
    if paths.is_remote(workdir):
        return
    for name in (*_FOLDERS, *_FILES):
        place, wanted = workdir / name, 'a folder' if name in _FOLDERS else 'a file'
        if os.path.lexists(place) and not (place.is_dir() if name in _FOLDERS else place.is_file()):
            found = 'a folder' if place.is_dir() else 'a file' if place.exists() else 'a link to nothing'
            raise UserError(f'{place} is {found}, and a run writes {wanted} there: move it, or give another '
                            f'--workdir')


def _other_classes(stored: Mapping, classes) -> list[str]:
    was = stored.get('classes')
    if not (isinstance(was, list) and classes) or was == classes:
        return []
    number = next((i for i, (a, b) in enumerate(zip(was, classes, strict=False)) if a != b), None)
    if number is None:
        return []       # so many more or fewer, as the recipe or the data say
    return [f'class {number}: {shown(was[number])} there, {shown(classes[number])} now']


def claim_workdir(workdir, recipe: Mapping, describe: Mapping, null_text=None,
                  inputs: Mapping | None = None) -> float:
    """Writes the workdir's config.json, once all checks have passed. Returns the unix time of the first
    claim.

    Process 0 writes; the others return when the file is there. describe: 'model', 'diffusion', 'latent',
    'classes', for readers of the weights. null_text: of a text model, the empty caption's features [L, C].
    inputs: as for `check_workdir`, which has compared them."""
    about = describe if inputs is None else {**describe, 'inputs': inputs}
    return peers.from_lead(lambda: _claim(paths.as_path(workdir), recipe, about, null_text))


def _claim(workdir, recipe: Mapping, describe: Mapping, null_text) -> float:
    began = time.time()
    if is_workdir(workdir):
        began = read_workdir(workdir).get('began', began)
    if null_text is not None:
        with paths.explain_unreachable(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            paths.write_bytes_atomic(workdir / null_caption.FILE, null_caption.pack(null_text))
        told = null_caption.digest(null_text)
        describe = {**describe, 'text': {**(describe.get('text') or {}), 'null_caption': told}}
    content = {'format': FORMAT, 'kind': 'workdir', 'began': began, 'recipe': plain(recipe), **describe}
    with paths.explain_unreachable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        paths.write_text_atomic(workdir / CONFIG, json.dumps(sealed(content), indent=1) + '\n')
    return began


def is_workdir(path) -> bool:
    """Whether a training run lives in `path`."""
    with paths.explain_unreachable(path):
        found = (paths.as_path(path) / CONFIG).is_file()
    return found and read_workdir(path).get('kind') == 'workdir'


def read_workdir(workdir) -> dict:
    """The contents of a workdir's config.json."""
    path = paths.as_path(workdir) / CONFIG
    return unsealed(read_json(path, _SHAPE), path)


def read_inputs(workdir) -> dict:
    """What the run in a workdir is trained with, as its config.json has it; {} if it does not say, or there
    is none."""
    path = paths.as_path(workdir) / CONFIG
    with paths.explain_unreachable(path):
        stored = read_workdir(workdir) if path.exists() else {}
    return stored.get('inputs') or {}


def _with_defaults(was: Mapping, now: Mapping, defaults) -> dict:
    """A field added to recipes since then takes its default in the older one."""
    known = defaults if isinstance(defaults, Mapping) else {}
    filled = {name: known[name] for name in now if name in known} | was
    return {name: _with_defaults(value, now[name], known.get(name))
            if isinstance(value, Mapping) and isinstance(now.get(name), Mapping) else value
            for name, value in filled.items()}


def _complete_mixer(recipe: dict) -> None:
    """An option that a mixer got since then takes its default in the older recipe."""
    mixer = (recipe.get('model') or {}).get('mixer') or {}
    if (name := mixer.get('name')) in tuple(MIXERS):
        recipe['model']['mixer'] = plain(MIXERS[name].defaults()) | mixer


def _decisive(recipe: Mapping, free: tuple[str, ...], prefix: str = '') -> dict:
    """The fields that must stay as they are."""
    return {name: _decisive(value, free, f'{prefix}{name}.') if isinstance(value, Mapping) else value
            for name, value in recipe.items() if prefix + name not in free}
