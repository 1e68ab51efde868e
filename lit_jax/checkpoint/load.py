"""Loads a model from a model folder or a training workdir."""
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lit_jax.checkpoint import null_caption
from lit_jax.checkpoint.arrays import read_leaf
from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.model_folder import (
    ARRAYS,
    CONFIG,
    check_config,
    check_model,
    is_model_folder,
    load_model_folder,
    read_config,
)
from lit_jax.checkpoint.text_encoder_folder import is_text_encoder_folder
from lit_jax.checkpoint.vae_folder import is_vae_folder
from lit_jax.checkpoint.workdir import is_workdir, read_workdir
from lit_jax.models.arch import conditioning
from lit_jax.models.low_rank import is_update, merge_stored
from lit_jax.models.network import DTYPES, Model, Network
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError, check_known, did_you_mean
from lit_jax.runtime.leaves import merged, named_leaves, placed, unflatten
from lit_jax.runtime.paths import as_path, explain_unreachable, is_remote
from lit_jax.runtime.shipped import find_asset


def load(path, *, step: int | None = None, dtype='float32', scan_layers: bool = True) -> Model:
    """A ready model from a model folder, or from a workdir (newest undamaged checkpoint, EMA weights).

    path: local, or in a bucket (gs://...). step: of a workdir, the checkpoint to take instead of the newest.
    dtype: compute dtype, 'float32' or 'bfloat16'. scan_layers: loop over the blocks, or unroll them (longer
    to compile, often faster on CPU). Returns `model(x, t, y)`: x [B, H, W, C], t in 0..999, y class indices
    -> [B, H, W, 2C], noise first. Raises UserError: nothing to load, damaged files, or an unknown dtype."""
    check_known('dtype', dtype, DTYPES)
    config, params = load_weights(path, step=step)
    network = Network(config['model'], dtype=DTYPES[dtype], scan_layers=scan_layers)
    return Model(network, params, config)


def load_weights(path, shard: Callable | None = None, *, step: int | None = None) -> tuple[dict, dict]:
    """(config, params) of a model folder or workdir; params in float32. Called by all processes together.

    shard: (abstract tree, architecture) -> tree of shardings, each device reading its part; None: the first
    device. step: of a workdir, the checkpoint to take instead of the newest."""
    path = as_path(path)
    with explain_unreachable(path):
        kind = peers.together(lambda: _kind(path))
        if kind == 'model folder':
            _check_no_step(path, step)
            return load_model_folder(path, _abstract(read_weights_config(path), shard))
        config = read_weights_config(path)
        params, step = Checkpoints(path).restore_part(
            'ema', lambda stored: _abstract(config, shard, stored), step, 'params')
        params = merge_stored(params)
    config['provenance'] = {'source': str(path), 'weights': 'ema', 'step': step}
    return config, params


def load_updates(path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, {name: EMA of what was trained}) of the newest whole checkpoint of a workdir, where low-rank
    updates are not merged. UserError for a model folder, whose updates are."""
    path = as_path(path)
    if peers.together(lambda: _kind(path)) == 'model folder':
        raise UserError(f'{path} is a model folder: low-rank updates are merged in it; give the workdir of '
                        f'the run')
    return read_workdir(path), named_leaves(Checkpoints(path).restore_part('ema')[0])


def read_null_caption(path, step: int | None = None) -> np.ndarray | None:
    """Features float32 [L, C] of the empty caption beside a text model; None if they are not known."""
    path = as_path(path)
    with explain_unreachable(path):
        features = null_caption.read_file(path)
        if features is not None:
            told = (read_weights_config(path).get('text') or {}).get('null_caption')
            return null_caption.checked(features, told, path)
        if _kind(path) == 'workdir':       # of an earlier version
            steps = Checkpoints(path).steps()
            if not steps:
                return None
            where = path / 'checkpoints' / f'{steps[-1] if step is None else step:09d}' / 'state'
            return read_leaf(where, f'ema/{null_caption.LEAF}')
        text = read_config(path).get('text') or {}
        return None if text.get('null_caption') == 'absent' else read_leaf(path / ARRAYS, null_caption.LEAF)


def read_weights_config(path) -> dict:
    """The config that `load_weights` would give, without reading weights. Called by each process alone."""
    config = read_config(path) if _kind(as_path(path)) == 'model folder' else _read_run(path)
    check_model(config, as_path(path) / CONFIG)
    return config


def _read_run(workdir) -> dict:
    """config.json of a workdir; the model of a run that drops no classes says that it has no null class."""
    config = read_workdir(workdir)
    check_config({'provenance': {}, **config}, str(as_path(workdir) / CONFIG))
    train = (config.get('recipe') or {}).get('train')
    drops = not isinstance(train, dict) or train.get('label_dropout') != 0
    if not drops and conditioning(config['model']) == 'label':
        config['model'] = {**config['model'], 'null_class': False}
    return config


def find_steps(path) -> list[int]:
    """Steps of the checkpoints in a workdir, rising. UserError for a model folder, which has none."""
    if _kind(as_path(path)) == 'model folder':
        _check_no_step(path, 'any')
    with explain_unreachable(path):
        return Checkpoints(path).steps()


def _check_no_step(path, step) -> None:
    if step is not None:
        raise UserError(f'{path} is a model folder, which has no steps; give a step for a workdir only.')


def _kind(path) -> str:
    with explain_unreachable(path):
        if is_model_folder(path):
            return 'model folder'
        if is_workdir(path):
            return 'workdir'
        exists = path.exists()
    if not exists:
        source, near = _shipped(path.name) or 'SRC', _near(path)
        where = '' if is_remote(path) or path.is_absolute() else f' in {os.getcwd()}'
        raise UserError(f'{path} does not exist{where}{near}; expected a model folder (python '
                        f'convert_torch_ckpt.py {source} --out {path}) or a workdir of train.py')
    if path.suffix == '.npz':
        raise UserError(f'{path} is a set of images or a reference, not a model; give a model folder '
                        '(convert_torch_ckpt.py writes one) or a workdir of train.py')
    if is_vae_folder(path):
        raise UserError(f'{path} is a VAE folder, not a diffusion model; give it as --vae')
    if is_text_encoder_folder(path):
        raise UserError(f'{path} is a text encoder folder, not a diffusion model; give it as --text_encoder')
    raise UserError(f'{path} is neither a model folder (with arrays/) nor a workdir (with checkpoints/).'
                    f'{conversion_hint(path)}')


def _shipped(name: str) -> str:
    """'assets/digits_dit.safetensors' for the name of a model that ships, else ''."""
    file = find_asset(f'{name}.safetensors')
    return f'assets/{file.name}' if file.is_file() else ''


def _near(path) -> str:
    """' (did you mean models/mine?)' for a model or run beside a local path, of a name near to its."""
    if is_remote(path) or not path.parent.is_dir():
        return ''
    known = [entry.name for entry in sorted(path.parent.iterdir())
             if entry.is_dir() and (is_model_folder(entry) or is_workdir(entry))]
    parent = '' if path.parent == as_path('.') else f'{path.parent}/'
    return did_you_mean(path.name, known, parent)


def _abstract(config: dict, shard: Callable | None, stored: Mapping | None = None) -> dict:
    """The parameters, with the factors of low-rank updates among the leaves that are stored."""
    network = Network(config['model'])
    factors = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in (stored or {}).items()
               if is_update(name)}
    abstract = merged(network.abstract(), unflatten(factors)) if factors else network.abstract()
    return abstract if shard is None else placed(abstract, shard(abstract, network.arch))
