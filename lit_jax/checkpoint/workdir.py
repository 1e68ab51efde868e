"""The workdir: which recipe lives in it, and the refusal to mix two.

    config.json  checkpoints/000400000/  metrics.jsonl  samples/  inheritance.json  report.html
"""
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lit_jax.errors import UserError

FORMAT = 1
CONFIG = 'config.json'
# What may differ when a run is started again: it changes neither the weights nor the data of the steps already done.
FREE_SECTIONS = ('mesh', 'log', 'checkpoint', 'sample')
FREE_FIELDS = ('train.steps', 'train.scan_layers', 'train.remat', 'data.path', 'teacher.path', 'inherit.path')


def check_workdir(workdir: Path, recipe: Mapping) -> None:
    """Raises UserError if the workdir was made by another recipe (listing every field that differs), or is none.

    Args:
        recipe: the finalized recipe as a dict.
    """
    workdir = Path(workdir)
    if (workdir / CONFIG).exists():
        differences = _differences(read_workdir(workdir).get('recipe', {}), _plain(recipe))
        if differences:
            raise UserError(f'{workdir} belongs to another recipe:\n  ' + '\n  '.join(differences) +
                            '\nGive another --workdir, or the recipe that it was made with.')
    elif (workdir / 'checkpoints').exists():
        raise UserError(f'{workdir} has checkpoints but no {CONFIG}; give another --workdir or restore the file')


def claim_workdir(workdir: Path, recipe: Mapping, describe: Mapping) -> None:
    """Writes the workdir's config.json, once everything that can be wrong has been looked at.

    Args:
        describe: what a reader of the weights needs ('model', 'diffusion', 'latent', 'classes'); written beside the recipe.
    """
    content = {'format': FORMAT, 'kind': 'workdir', 'recipe': _plain(recipe), **describe}
    _write_json(Path(workdir) / CONFIG, content)


def _plain(recipe: Mapping) -> dict:
    """As it will be read back: tuples become lists."""
    return json.loads(json.dumps(recipe))


def is_workdir(path: Path) -> bool:
    """Whether a training run lives in `path`."""
    return (Path(path) / CONFIG).is_file() and read_workdir(path).get('kind') == 'workdir'


def read_workdir(workdir: Path) -> dict:
    """The contents of a workdir's config.json."""
    path = Path(workdir) / CONFIG
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
