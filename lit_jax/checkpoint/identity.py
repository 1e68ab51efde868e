"""What tells the weights of one folder from those of another, wherever the folders lie."""
import hashlib
import json
from collections.abc import Mapping

import jax

from lit_jax.checkpoint.load import find_steps, load_weights, read_weights_config
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.model_folder import ARRAYS
from lit_jax.checkpoint.workdir import is_workdir
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import params_sha256
from lit_jax.runtime.paths import absolute, as_path, explain_unreachable, file_sha256, is_remote
from lit_jax.runtime.storage import MANIFEST, read_manifest

IN_FILES = ('name', 'manifest')      # of `params_identity`: where and as what weights are stored


def weights_identity(path, known: Mapping | None = None, *, needed: bool = True) -> dict:
    """{'sha256': ...} of a model folder, {'run': ..., 'step': ..., 'sha256': ...} of a workdir. JSON-able.

    The sha256 is that of the manifest's lines about the weights. known: an identity from before; while a
    workdir still has the checkpoint of its step, that one is described, else the newest whole one. needed:
    False takes a later checkpoint of the same run for the one that is known. Called by one process."""
    path, known = absolute(path), known or {}
    with explain_unreachable(path):
        config = read_weights_config(path)
        if not is_workdir(path):
            return {'sha256': _digest(path, ARRAYS, config)}
        checkpoints, run, step = Checkpoints(path), config.get('began'), known.get('step')
        if step not in checkpoints.steps():
            if not needed and run is not None and known.get('run') == run:
                return dict(known)
            step = checkpoints.newest_whole()
        return {'run': run, 'step': step, 'sha256': _digest(checkpoints.directory / f'{step:09d}', 'state')}


def _digest(folder, under: str, config: Mapping | None = None) -> str:
    """Of the sizes and checksums of the files in `folder/under`, without the notes of the library that wrote
    them. A bucket keeps the checksums itself; there the sha256 of the source file is added."""
    if (table := read_manifest(folder)) is None:
        raise UserError(f'{folder / MANIFEST} is missing or damaged. Copy the folder again')
    files = {name: entry for name, entry in table.items()
             if name.startswith(f'{under}/') and not name.rpartition('/')[2].startswith(('_', '.'))}
    if not all('crc32' in entry for entry in files.values()):
        files |= {'source': ((config or {}).get('provenance') or {}).get('sha256')}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def params_identity(path, step: int | None = None) -> dict:
    """{'name', 'step' (None: of a model folder), 'manifest': sha256 of the list of its files, 'sha256': of
    the parameters}, whatever they are stored as. Reads all; called by all processes together."""
    path = as_path(path)
    config, params = load_weights(path, step=step)
    digest = params_sha256(params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    step = config['provenance'].get('step') if peers.together(lambda: is_workdir(path)) else None
    return {'name': path.name, 'step': step, 'manifest': _manifest_sha256(path, step), 'sha256': digest}


def are_weights(path, identity: Mapping) -> bool:
    """Whether the weights that `load_weights` gives have this identity; reads them only if the files differ.
    Called by all processes together."""
    path = as_path(path)
    step = None
    if peers.together(lambda: is_workdir(path)):
        step = max(peers.from_lead(lambda: find_steps(path)), default=None)
    if identity.get('manifest') is not None and peers.from_lead(
            lambda: _manifest_sha256(path, step)) == identity['manifest']:
        return True
    return params_identity(path, step)['sha256'] == identity['sha256']


def _manifest_sha256(path, step: int | None) -> str | None:
    """None where there is no manifest, or none with checksums."""
    folder = path if step is None else path / 'checkpoints' / f'{step:09d}'
    if is_remote(folder) or not (folder / MANIFEST).is_file():
        return None
    return file_sha256(folder / MANIFEST)
