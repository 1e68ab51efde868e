"""Models to the hub and back: pushed with their PyTorch code and a model card, loaded as model folders."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from safetensors import safe_open

from lit_jax.checkpoint.load import read_weights_config
from lit_jax.checkpoint.model_folder import CONFIG, is_model_folder
from lit_jax.checkpoint.workdir import is_workdir, read_workdir
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_files import METADATA_KEY
from lit_jax.convert.torch_import import convert
from lit_jax.convert.torch_student import MODELING, WEIGHTS, check_student
from lit_jax.deploy.hub_client import check_arrived, check_token, client, download, explain_hub, hub_cache
from lit_jax.deploy.model_card import model_card
from lit_jax.evaluation.table import read_rows
from lit_jax.runtime import writers
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.errors import UserError, listed
from lit_jax.runtime.hub import HUB, hub_name
from lit_jax.runtime.json_file import parse_json, read_json
from lit_jax.runtime.paths import as_path, make_folder, remove_tree

IMAGES = '.png', '.jpg', '.jpeg', '.webp'
CARD = 'README.md'
_OURS = {CARD, CONFIG, WEIGHTS, MODELING, '.gitattributes'}


def local_model(name: str) -> Path:
    """The model folder of the newest version of a model on the hub, made once from its weights."""
    found = download(name)
    out = hub_cache() / 'models' / name.replace('/', '--') / found.name
    if is_model_folder(out):
        return out
    if not (found / WEIGHTS).is_file():
        raise UserError(f'{name} is no model of lit_jax: it has no {WEIGHTS}, which push.py writes')
    if jax.process_count() > 1:      # one converts for all, which not all have asked for
        raise UserError(f'{name} is not in the cache of this machine: before a run of several processes, '
                        f'read it once on each, python -c "import lit_jax; lit_jax.load(\'{HUB}{name}\')"')
    make_folder(out.parent)
    with claimed(out, wait=True):
        if not is_model_folder(out):
            check_arrived(found / WEIGHTS, name)
            convert(found / WEIGHTS, out, source_name=HUB + name)
    return out


def push(src, name: str, *, private: bool = False, licence: str = '', figures=None,
         images: Sequence[str] = ()) -> str:
    """Uploads a model folder or workdir as OWNER/NAME; returns the address of its page.

    What was uploaded before a stop is not uploaded again. figures: folder of `evaluate.py --out`.
    images: files for the card; of a workdir, the newest sheet by default. UserError before anything is
    uploaded where the name, the token, the weights or a file is wrong."""
    name, package = hub_name(name), client()
    config = read_weights_config(src)
    sheets, rows = _images(src, images), _figures(figures)
    check_token()
    api, target = package.HfApi(), hub_cache() / 'pushes' / name.replace('/', '--')
    with explain_hub(name, 'pushed'):
        api.whoami()                                # before a copy of the weights is made
        _check_place(api, name, private)
    with claimed(target):
        folder = writers.sibling(target, 'partial')
        try:
            _stage(src, config, folder, sheets)
            code = (folder / MODELING).is_file()
            card = model_card(name, _told(config, folder), licence, rows, list(sheets), code)
            (folder / CARD).write_text(card)
            with explain_hub(name, 'pushed'):
                address = api.create_repo(name, private=private or None, exist_ok=True)
                api.upload_folder(repo_id=name, folder_path=folder, commit_message='Upload by lit_jax',
                                  delete_patterns=[MODELING])
        finally:
            remove_tree(folder)
    return str(address)


def _check_place(api, name: str, private: bool) -> None:
    """UserError for a place that holds something else, or is seen by more people than asked for."""
    from huggingface_hub import errors
    try:
        found = api.model_info(name)
    except errors.RepositoryNotFoundError:
        return
    if private and not found.private:
        raise UserError(f'{name} is public already; make it private on its page, or leave out --private')
    files = [file.rfilename for file in found.siblings or ()]
    if foreign := [file for file in files if file not in _OURS and not file.endswith(IMAGES)]:
        raise UserError(f'{name} holds files that push.py did not write; give another name, or remove '
                        f'them:{listed(foreign, 5)}')


def _stage(src, config: Mapping, folder: Path, sheets: Mapping[str, Path]) -> None:
    """What is uploaded but the card: weights and config, with the PyTorch code where there is one."""
    if _has_code(config):
        export(src, folder, layout='lit')
    else:
        folder.mkdir()
        export(src, folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, 'numpy') as file:
            told = parse_json(file.metadata()[METADATA_KEY], folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(told, indent=2) + '\n')
    for name, file in sheets.items():
        (folder / name).write_bytes(file.read_bytes())


def _has_code(config: Mapping) -> bool:
    try:
        check_student(config['model'])
    except UserError:
        return False
    return True


def _told(config: Mapping, folder: Path) -> dict:
    """What the card tells: the config, with what is written about the weights, and the recipe."""
    written = read_json(folder / CONFIG, {str: object})
    return {**config, 'recipe': _recipe(config),
            'provenance': {**(written.get('provenance') or {}), **(config.get('provenance') or {})}}


def _recipe(config: Mapping) -> Mapping | None:
    """Of a workdir, or of the one that a model folder was taken from, if it is still there."""
    source = (config.get('provenance') or {}).get('source')
    if 'recipe' in config or not source or not Path(source).is_dir() or not is_workdir(source):
        return config.get('recipe')
    run = read_workdir(source)
    return run['recipe'] if run.get('model') == config['model'] else None


def _images(src, given: Sequence[str]) -> dict[str, Path]:
    """{name in the card: file}."""
    files = [as_path(file) for file in given]
    if wrong := [file for file in files if not file.is_file() or file.suffix.lower() not in IMAGES]:
        raise UserError(f'{wrong[0]} is no image file ({", ".join(IMAGES)})')
    named = {file.name: file for file in files or sorted((as_path(src) / 'samples').glob('*.png'))[-1:]}
    if len(named) < len(files):
        raise UserError('two of the images have the same name; rename one')
    return named


def _figures(folder) -> list[dict]:
    rows = read_rows(folder) if folder else []
    if folder and not rows:
        raise UserError(f'{folder} holds no scores.json of evaluate.py')
    return rows
