"""The workdir: which recipe it belongs to, and the refusal to mix two. A local folder, or one in a bucket
(gs://...).

    config.json  checkpoints/000400000/  metrics.jsonl  samples/  inheritance.json  report.html
    null_caption.npy  (of a text model)

`check_workdir` and `claim_workdir` are called by all processes together; the other functions by any."""
import json
import time
from collections.abc import Mapping

from lit_jax.checkpoint import null_caption
from lit_jax.recipes.recipe import default
from lit_jax.runtime import paths, peers
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import plain, read_json, sealed, unsealed

FORMAT = 1
CONFIG = 'config.json'
# What may differ when a run resumes: it changes neither the weights nor the data of the steps already done.
FREE_SECTIONS = ('mesh', 'log', 'checkpoint', 'sample', 'eval', 'published')
FREE_FIELDS = ('train.steps', 'train.scan_layers', 'train.remat', 'data.path', 'teacher.path', 'inherit.path')


def check_workdir(workdir, recipe: Mapping) -> None:
    """Raises UserError on all processes if the workdir is none, or belongs to another finalized recipe."""
    peers.only_lead(lambda: _check(paths.as_path(workdir), recipe))


def _check(workdir, recipe: Mapping) -> None:
    paths.check_reachable(workdir)
    with paths.explain_unreachable(workdir):
        claimed, used = (workdir / CONFIG).exists(), (workdir / 'checkpoints').exists()
    if claimed:
        now = _plain(recipe)
        was = _with_defaults(read_workdir(workdir).get('recipe', {}), now, _plain(default().to_dict()))
        check_alike(_decisive(was), _decisive(now), 'there', 'in this recipe', f'{workdir} belongs to '
                    'another recipe', 'Give another --workdir, or the recipe that it was made with.')
    elif used:
        raise UserError(f'{workdir} has checkpoints but no {CONFIG}; restore it or give another --workdir')


def claim_workdir(workdir, recipe: Mapping, describe: Mapping, null_text=None) -> float:
    """Writes the workdir's config.json, once all checks have passed. Returns the unix time of the first
    claim.

    Process 0 writes; the others return when the file is there. describe: 'model', 'diffusion', 'latent',
    'classes', for readers of the weights. null_text: of a text model, the empty caption's features [L, C]."""
    return peers.from_lead(lambda: _claim(paths.as_path(workdir), recipe, describe, null_text))


def _claim(workdir, recipe: Mapping, describe: Mapping, null_text) -> float:
    began = time.time()
    if is_workdir(workdir):
        began = read_workdir(workdir).get('began', began)
    if null_text is not None:
        with paths.explain_unreachable(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            paths.write_bytes_atomic(workdir / null_caption.FILE, null_caption.pack(null_text))
    content = {'format': FORMAT, 'kind': 'workdir', 'began': began, 'recipe': _plain(recipe), **describe}
    with paths.explain_unreachable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        paths.write_text_atomic(workdir / CONFIG, json.dumps(sealed(content), indent=1) + '\n')
    return began


def _plain(recipe: Mapping) -> dict:
    """As JSON reads it back: tuples become lists."""
    return plain(recipe)


def is_workdir(path) -> bool:
    """Whether a training run lives in `path`."""
    with paths.explain_unreachable(path):
        found = (paths.as_path(path) / CONFIG).is_file()
    return found and read_workdir(path).get('kind') == 'workdir'


def read_workdir(workdir) -> dict:
    """The contents of a workdir's config.json."""
    path = paths.as_path(workdir) / CONFIG
    return unsealed(read_json(path, {}), path)


def _with_defaults(was: Mapping, now: Mapping, defaults) -> dict:
    """A field added to recipes since then takes its default in the older one."""
    known = defaults if isinstance(defaults, Mapping) else {}
    filled = {name: known[name] for name in now if name in known} | was
    return {name: _with_defaults(value, now[name], known.get(name))
            if isinstance(value, Mapping) and isinstance(now.get(name), Mapping) else value
            for name, value in filled.items()}


def _decisive(recipe: Mapping, prefix: str = '') -> dict:
    """The fields that must stay as they are."""
    return {name: _decisive(value, f'{prefix}{name}.') if isinstance(value, Mapping) else value
            for name, value in recipe.items() if prefix + name not in (*FREE_SECTIONS, *FREE_FIELDS)}
