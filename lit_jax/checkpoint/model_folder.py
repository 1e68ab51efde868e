"""Model folders: written by the converter and by training, read by sampling.

    config.json     architecture, diffusion, latent space, class names, provenance (fields: `check_config`),
                    and its own checksum, to be deleted by who edits it
    arrays/         the parameters (Orbax)
    null_caption.npy  of a text model, the features of the empty caption [L, C]
    projectors.npz  of a REPA, its projectors, which feed no sample
    manifest.json   sizes and checksums of the other files

A folder is written beside its final name and renamed when complete, so a folder that exists is complete. In
an object store (gs://...) nothing can be renamed: there config.json is written last and marks a complete
folder. Several processes save and load together; process 0 writes what is written once, and alone reads all
bytes to check them, the others compare sizes."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping

from etils import epath

from lit_jax.checkpoint.arrays import load_arrays, write_arrays
from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.null_caption import FILE, digest, pack
from lit_jax.checkpoint.projector_file import FILE as PROJECTORS
from lit_jax.checkpoint.projector_file import pack as pack_projectors
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.models.arch import check_arch
from lit_jax.runtime import claim, leaves, peers, storage, writers
from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.json_file import read_json, sealed, unsealed
from lit_jax.runtime.paths import (
    absolute,
    as_path,
    check_no_pattern,
    explain_unwritable,
    is_remote,
    prepare_place,
    remove_tree,
    write_text_atomic,
)

FORMATS = (1, 2)      # text models of format 1 kept the null caption among their parameters
CONFIG = 'config.json'
ARRAYS = 'arrays'
_GIVE = 'Give a folder written by convert_torch_ckpt.py or by training.'
_SPACES = ('pixels', 'vae')


def is_model_folder(path) -> bool:
    """Whether `path` looks like a model folder (its content may still be damaged; loading checks that)."""
    path = as_path(path)
    if not (path / CONFIG).is_file() or not (path / ARRAYS).is_dir():
        return False
    try:
        return read_json(path / CONFIG, {str: object}).get('kind') not in ('vae', 'text_encoder')
    except UserError:
        return True


def save_model_folder(path, config: dict, params, *, null_caption=None, projectors: Mapping | None = None,
                      overwrite=False) -> epath.Path:
    """Writes a model folder, all of it or nothing, and returns its path.

    config: the fields of `check_config`; 'format' may be left out. params: nested dict of numpy or jax
    arrays. null_caption: of a text model, the features of the empty caption, if known; the config has their
    sha256 then, else 'absent'. projectors: see `lit_jax.checkpoint.projector_file`. Raises UserError for
    a wrong config, a full disk, or a target in use (a file; a folder that is not empty, unless overwrite=True
    and it is a model folder)."""
    path = absolute(path)
    config, files = {'format': FORMATS[0], **config}, {}
    check_config(config, 'the config to be saved')
    if text := config.get('text'):
        files = {} if null_caption is None else {FILE: pack(null_caption)}
        told = digest(null_caption) if files else 'absent'
        config |= {'format': FORMATS[1], 'text': {**text, 'null_caption': told}}
    if projectors:
        files |= {PROJECTORS: pack_projectors(projectors)}
    peers.only_lead(lambda: check_target(path, overwrite, 'model', is_model_folder))
    write_folder(path, config, params, files)
    return path


def write_folder(path: epath.Path, config: Mapping, params, files: Mapping[str, bytes] | None = None, *,
                 by_layer: bool = False) -> None:
    """A folder of any kind with its manifest, all of it or nothing; an existing one is replaced. files: name
    -> content of further files, covered by the manifest. by_layer: as for `write_arrays`."""
    text = json.dumps(sealed(config), indent=2, allow_nan=False) + '\n'
    with claim.claimed(path):
        (_write_remote if is_remote(path) else _write_local)(path, text, params, files or {}, by_layer)


def _write_local(path: epath.Path, text: str, params, files: Mapping[str, bytes], by_layer: bool) -> None:
    needed = leaves.tree_bytes(params) + (1 << 20)

    def prepare() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers.remove_siblings(path, 'partial')
        partial = writers.sibling(path, 'partial')
        with explain_unwritable(path, needed):
            storage.check_free_space(path, needed)
            partial.mkdir()
        return str(partial)

    def complete() -> None:
        with explain_unwritable(path, needed):
            (partial / CONFIG).write_text(text)
            for name, content in files.items():
                (partial / name).write_bytes(content)
            storage.write_manifest(partial, skip=(CONFIG,))
            storage.fsync_tree(partial)
        claim.check()
        _move_into_place(partial, path)

    partial = epath.Path(peers.from_lead(prepare))  # the name holds process 0
    try:
        with explain_unwritable(path, needed):
            write_arrays(partial / ARRAYS, params, by_layer=by_layer)
        peers.only_lead(complete)
    finally:
        if peers.is_lead():
            remove_tree(partial)


def _write_remote(path: epath.Path, text: str, params, files: Mapping[str, bytes], by_layer: bool) -> None:
    def clear() -> None:
        if path.is_dir():
            (path / CONFIG).unlink(missing_ok=True)  # from here on it is no model folder
            path.rmtree(missing_ok=True)

    def complete() -> None:
        for name, content in files.items():
            (path / name).write_bytes(content)
        claim.check()
        storage.write_manifest(path, skip=(CONFIG,))
        write_text_atomic(path / CONFIG, text)

    peers.only_lead(clear)
    try:
        write_arrays(path / ARRAYS, params, by_layer=by_layer)
        peers.only_lead(complete)
    except BaseException:
        if peers.is_lead():
            remove_tree(path)
        raise


def load_model_folder(path, abstract=None) -> tuple[dict, dict]:
    """(config, params) of a model folder, or UserError for a bad one. abstract: as for `load_arrays`."""
    path = absolute(path)
    config = peers.together(lambda: _read_checked(path))
    return config, load_arrays(path / ARRAYS, abstract)


def _read_checked(path: epath.Path) -> dict:
    config = read_config(path)
    check_whole(path, 'model folder', 'checkpoint')
    return config


def check_whole(path: epath.Path, kind: str, source: str) -> None:
    """Raises UserError that lists the damaged files of a folder; `source`: what it was converted from."""
    damage = storage.find_damage(path, checksums=peers.is_lead())
    if not (path / ARRAYS).is_dir():
        damage = [f'{path / ARRAYS}: missing', *damage[:3]]
    if damage:
        shown = '\n  '.join(damage[:10])
        raise UserError(f'{kind} {path} is damaged; {len(damage)} of its files are not as they were '
                        f'written:\n  {shown}\nCopy the folder again, or convert the {source} again.')


def read_config(path) -> dict:
    """Reads and checks config.json of a model folder, without its arrays."""
    path, hint = absolute(path), ''
    if not path.is_dir():
        kept = sorted(path.parent.iterdir()) if path.parent.is_dir() and not is_remote(path) else []
        kept = [p for p in kept if p.name.startswith(f'.{path.name}.old.')]
        if kept:
            hint = f' An overwrite was interrupted; the previous folder is whole in {kept[-1]}: rename it.'
    config = parse_config(path, 'model', _GIVE, hint)
    check_config(config, str(path / CONFIG))
    return config


def parse_config(path: epath.Path, kind: str, give: str, hint: str = '') -> dict:
    """The content of config.json of a folder, as it was written, its fields not checked. kind, give, hint:
    for messages."""
    if not path.is_dir():
        found = 'it is a file' if path.exists() else 'there is no such folder'
        raise UserError(f'{path} is not a {kind} folder: {found}. {give}{hint}{conversion_hint(path)}')
    config = read_json(path / CONFIG, {str: object}, absent=None)
    if config is None:
        raise UserError(f'{path} is not a {kind} folder: it has no {CONFIG}. {give}{conversion_hint(path)}')
    return unsealed(config, path / CONFIG)


def check_config(config, source: str) -> None:
    """Raises one UserError with everything wrong in a model folder's config; `source`: where it stands.

    Fields: format; model {family, ...}; diffusion (`lit_jax.diffusion.kinds`); latent {space: 'pixels'
    or 'vae', vae: id or null, scale}; classes: list of names, or null; text, of models that take captions:
    {encoder: id or null, channels, tokens, null_caption: sha256 of null_caption.npy, or 'absent'}; sampling
    {method, steps, cfg_scale}, defaults of its recipe, if known; provenance {...}. Unknown fields are
    allowed."""
    if not isinstance(config, dict):
        raise UserError(f'{source} must hold a JSON object, got {shown(config)}.')
    if config.get('format') not in FORMATS:
        raise UserError(f'{source} has format {shown(config.get("format"))}; this version of lit_jax reads '
                        f'formats 1 and 2. Use the version that wrote it, or convert the checkpoint again.')
    sections = ('model', 'diffusion', 'latent', 'provenance')
    missing = [key for key in sections if not isinstance(config.get(key), dict)]
    problems = [f'"{key}" is missing or not an object' for key in missing]
    if not problems:
        problems = [text for holds, text in _rules(config) if not holds]
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f'it does not fit into JSON ({reason_of(error)})')
    if problems:
        raise UserError(f'{source} is not a valid model config: {"; ".join(problems)}.')


def check_model(config: Mapping, source) -> None:
    """Raises UserError, with the name of the file, for an architecture that cannot be built."""
    try:
        check_arch(config['model'])
    except UserError as error:
        raise UserError(f'{source} describes no model that can be built: {error}') from error


def _rules(config: dict) -> list[tuple[bool, str]]:
    model, diffusion, latent, classes = map(config.get, ('model', 'diffusion', 'latent', 'classes'))
    return [
        (isinstance(model.get('family'), str), '"model.family" must be a name'),
        *_diffusion_rules(diffusion),
        (latent.get('space') in _SPACES, f'"latent.space" must be one of {", ".join(_SPACES)}'),
        (isinstance(latent.get('vae'), str | None), '"latent.vae" must be a name or null'),
        (is_positive(latent.get('scale')), '"latent.scale" must be a number above 0'),
        (latent.get('downscale') is None or _is_int(latent['downscale']) and latent['downscale'] > 0,
         '"latent.downscale" must be a whole number over 0'),
        (classes is None or isinstance(classes, list) and all(isinstance(c, str) for c in classes),
         '"classes" must be a list of names or null'),
        (not isinstance(classes, list) or len(classes) == model.get('num_classes', len(classes)),
         f'"classes" has {len(classes or [])} names for {shown(model.get("num_classes"))} classes'),
        *_text_rules(config.get('text'), model),
        *_sampling_rules(config.get('sampling')),
    ]


def _diffusion_rules(section: Mapping) -> list[tuple[bool, str]]:
    """Everything that decides a sample is written down, and known."""
    needed = ('path', 'prediction', 'noise_at') if section.get('kind') == 'flow' else ('kind', 'steps')
    lacking = [(False, f'"diffusion.{name}" is missing') for name in needed if name not in section]
    try:
        read_diffusion(section)
    except UserError as error:
        return [*lacking, (False, str(error))]
    return lacking


def _text_rules(text, model: dict) -> list[tuple[bool, str]]:
    if text is None:
        return []
    if not isinstance(text, dict):
        return [(False, '"text" must be an object or null')]
    pairs = ('channels', 'caption_channels'), ('tokens', 'caption_tokens')
    return [(isinstance(text.get('encoder'), str | None), '"text.encoder" must be a name or null'),
            (isinstance(text.get('null_caption', 'absent'), str),
             '"text.null_caption" must be a sha256, "absent", or left out'),
            *((text.get(ours) == model.get(theirs), f'"text.{ours}" is {shown(text.get(ours))}, the '
               f'caption projection of the model has {shown(model.get(theirs))}') for ours, theirs in pairs)]


def _sampling_rules(sampling) -> list[tuple[bool, str]]:
    if sampling is None:
        return []
    if not isinstance(sampling, dict):
        return [(False, '"sampling" must be an object or null')]
    method, steps, scale = (sampling.get(name) for name in ('method', 'steps', 'cfg_scale'))
    return [(isinstance(method, str | None), '"sampling.method" must be a name'),
            (steps is None or _is_int(steps) and steps > 0, '"sampling.steps" must be a whole number over 0'),
            (scale is None or _is_int(scale) or isinstance(scale, float),
             '"sampling.cfg_scale" must be a number')]


def is_positive(value) -> bool:
    """Whether a value from a file is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_target(path, overwrite: bool, kind: str, is_kind: Callable) -> None:
    """Refuses an output that is in the way of a folder of any `kind`, and a place that cannot be written."""
    check_no_pattern(path)
    path = prepare_place(path)
    if path.exists() and not path.is_dir():
        raise UserError(f'cannot write a {kind} folder to {path}: a file of that name exists.')
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f'{path} exists and is not empty. Choose another folder, delete it, or give '
                        '--overwrite (from Python overwrite=True) where there is one.')
    if not is_kind(path):
        raise UserError(f'{path} is not a {kind} folder, so it will not be overwritten.')


def _move_into_place(partial: epath.Path, path: epath.Path) -> None:
    """Renames a finished folder to its final name. If that fails, the folder it replaces is put back."""
    old = writers.sibling(path, 'old')
    replaces = path.is_dir() and any(path.iterdir())
    if replaces:
        writers.remove_siblings(path, 'old')
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if replaces:
            os.rename(old, path)
        raise
    storage.fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)
