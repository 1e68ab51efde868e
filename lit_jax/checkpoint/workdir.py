"""The workdir: which recipe lives in it, and the refusal to mix two.

    config.json  checkpoints/000400000/  metrics.jsonl  samples/  inheritance.json  report.html
"""
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lit_jax.errors import UserError

FORMAT = 1
# What may differ when a run is started again: it changes neither the weights nor the data of the steps already done.
FREE_SECTIONS = ('mesh', 'log', 'checkpoint', 'sample')
FREE_FIELDS = ('train.steps', 'train.scan_layers', 'train.remat', 'data.path', 'teacher.path', 'inherit.path')


def claim_workdir(workdir: Path, recipe: Mapping, describe: Mapping) -> None:
    """Creates the workdir for `recipe`, or checks that it already belongs to it.

    Args:
        recipe: the finalized recipe as a dict.
        describe: what a reader of the weights needs ('model', 'diffusion', 'latent', 'classes'); written beside it.

    Raises:
        UserError: the workdir was made by another recipe (lists every field that differs), or is no workdir.
    """
    path = Path(workdir) / 'config.json'
    recipe = json.loads(json.dumps(recipe))
    if path.exists():
        differences = _differences(read_workdir(workdir).get('recipe', {}), recipe)
        if differences:
            raise UserError(f'{workdir} belongs to another recipe:\n  ' + '\n  '.join(differences) +
                            '\nGive another --workdir, or the recipe that it was made with.')
    elif (Path(workdir) / 'checkpoints').exists():
        raise UserError(f'{workdir} has checkpoints but no config.json; give another --workdir or restore the file')
    _write_json(path, {'format': FORMAT, 'kind': 'workdir', 'recipe': recipe, **describe})


def is_workdir(path: Path) -> bool:
    """Whether a training run lives in `path`."""
    return (Path(path) / 'config.json').is_file() and read_workdir(path).get('kind') == 'workdir'


def read_workdir(workdir: Path) -> dict:
    """The contents of a workdir's config.json."""
    path = Path(workdir) / 'config.json'
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not readable JSON: {error}') from error


def _write_json(path: Path, content: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.json.part')
    temporary.write_text(json.dumps(content, indent=1) + '\n')
    os.replace(temporary, path)


def _differences(was: Mapping, now: Mapping, prefix: str = '') -> list[str]:
    lines = []
    for key in sorted({*was, *now}):
        name = prefix + key
        if name in FREE_SECTIONS or name in FREE_FIELDS:
            continue
        before, after = was.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += _differences(before, after, name + '.')
        elif before != after:
            lines.append(f'{name}: {before!r} there, {after!r} in this recipe')
    return lines
