"""VAE folders: an autoencoder on disk, as convert_torch_ckpt.py and training write it.

    config.json     kind 'vae', architecture, id, scale (and shift) of the latents, provenance with the weights' sha256
    arrays/         the parameters (Orbax)
    manifest.json   sizes and checksums of the files under arrays/

They are written and checked like model folders (`lit_jax.checkpoint.model_folder`).
"""
import hashlib
import json
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from lit_jax.checkpoint import leaves, manager, peers
from lit_jax.checkpoint.model_folder import ARRAYS, CONFIG, check_whole, write_folder
from lit_jax.errors import UserError
from lit_jax.models.layers import Array
from lit_jax.models.network import DTYPES
from lit_jax.models.vae import VaeNetwork, check_vae_arch
from lit_jax.paths import absolute, as_path, explain_unreachable

FORMAT = 1
KIND = 'vae'
_GIVE = 'Give a folder that convert_torch_ckpt.py wrote: python convert_torch_ckpt.py DIFFUSERS_VAE --out models/sd_vae'


class Vae:
    """An autoencoder with its weights.

    A diffusion model works with x0 = scale · (latent - shift); `encode` and `decode` give and take the latent itself.

    Attributes:
        network: the `VaeNetwork`. params: its parameters (jax arrays, float32). config: what config.json holds.
        id: the name that data sets and models know it by, e.g. 'stabilityai/sd-vae-ft-ema'.
        sha256: of the weights; two folders with the same weights from the same file have the same.
        scale, shift: of the latents.
    """

    def __init__(self, network: VaeNetwork, params: dict, config: dict):
        self.network, self.params, self.config = network, params, config
        self.id: str = config['id']
        self.sha256: str = config['provenance']['sha256']
        self.scale: float = config['scale']
        self.shift: float = config['shift']
        self._encode = jax.jit(network.encode, static_argnames=('one_by_one',))
        self._decode = jax.jit(network.decode, static_argnames=('one_by_one', 'tile', 'overlap'))

    def encode(self, image_BHWC, **options) -> tuple[Array, Array]:
        """`VaeNetwork.encode`, compiled: pictures in [-1, 1] -> (mean, logvar)."""
        return self._encode(self.params, image_BHWC, **options)

    def decode(self, latent_BHWC, **options) -> Array:
        """`VaeNetwork.decode`, compiled: unscaled latents -> pictures, not clipped."""
        return self._decode(self.params, latent_BHWC, **options)


def is_vae_folder(path) -> bool:
    """Whether `path` looks like a VAE folder (its content may still be damaged; loading checks that)."""
    path = as_path(path)
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get('kind') == KIND and (path / ARRAYS).is_dir()


def save_vae_folder(path, config: dict, params, *, overwrite: bool = False) -> epath.Path:
    """Writes a VAE folder, all of it or nothing, and returns its path.

    config: {'vae': architecture, 'id', 'scale', 'provenance': {...}}, and 'shift' if there is one. Where provenance
    has no 'sha256' of source files (a VAE trained here), that of the parameters is put in. params: nested dict of
    numpy or jax arrays. Raises UserError for a wrong config, parameters that do not fit it, a target that is in use,
    or a full disk.
    """
    path = absolute(path)
    config = {'format': FORMAT, 'kind': KIND, 'shift': 0.0, **config}
    config['provenance'] = dict(config.get('provenance') or {})
    if 'sha256' not in config['provenance']:
        config['provenance']['sha256'] = params_sha256(params)
    config = check_vae_config(config, 'the config to be saved')
    leaves.check_leaves(leaves.named_leaves(params), leaves.named_leaves(VaeNetwork(config['vae']).abstract()),
                        'the parameters to be saved')
    text = json.dumps(config, indent=2, allow_nan=False) + '\n'
    peers.only_lead(lambda: check_vae_target(path, overwrite))
    write_folder(path, text, params)
    return path


def load_vae(path, dtype: str = 'float32', shard: Callable | None = None) -> Vae:
    """A ready VAE from its folder, local or in a bucket (gs://...). Several processes call it together.

    Args:
        dtype: compute dtype, 'float32' or 'bfloat16'.
        shard: abstract tree -> tree of shardings of the parameters; None: the first device.
    """
    if dtype not in DTYPES:
        raise UserError(f'unknown dtype {dtype!r}; known: {", ".join(DTYPES)}')
    path = absolute(path)
    with explain_unreachable(path):
        config = peers.together(lambda: _read_checked(path))
        network = VaeNetwork(config['vae'], dtype=DTYPES[dtype])
        abstract = network.abstract()
        if shard is not None:
            abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                                    abstract, shard(abstract))
        return Vae(network, manager.load_arrays(path / ARRAYS, abstract), config)


def read_vae_config(path) -> dict:
    """Reads and checks config.json of a VAE folder, without its arrays."""
    path = absolute(path)
    if not path.is_dir():
        found = 'it is a file' if path.exists() else 'there is no such folder'
        raise UserError(f'{path} is not a VAE folder: {found}. {_GIVE}')
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except FileNotFoundError:
        raise UserError(f'{path} is not a VAE folder: it has no {CONFIG}. {_GIVE}') from None
    except ValueError as error:
        raise UserError(f'{path / CONFIG} is damaged: it is not valid JSON ({error}). Copy it again from its source, or '
                        'convert the VAE again.') from error
    if isinstance(config, dict) and '_class_name' in config:
        raise UserError(f'{path} is a diffusers folder ({config["_class_name"]}), not yet a VAE folder: python '
                        f'convert_torch_ckpt.py {path} --out DIR makes one.')
    return check_vae_config(config, str(path / CONFIG))


def check_vae_config(config, source: str) -> dict:
    """The config with its architecture complete, or one UserError that lists what is wrong.

    source: where it stands, for the message."""
    if not isinstance(config, dict) or config.get('kind') != KIND:
        kind = config.get('kind', 'a model') if isinstance(config, dict) else type(config).__name__
        raise UserError(f'{source} describes {kind}, not a VAE. {_GIVE}')
    if config.get('format') != FORMAT:
        raise UserError(f'{source} has format {config.get("format")!r}; this version of lit_jax reads format {FORMAT}. '
                        'Use the lit_jax version that wrote the folder, or convert the VAE again.')
    vae, provenance = config.get('vae'), config.get('provenance')
    problems = [text for holds, text in [
        (isinstance(vae, dict), '"vae" must hold the architecture'),
        (isinstance(config.get('id'), str) and config['id'], '"id" must be a name'),
        (_is_number(config.get('scale')) and config['scale'] > 0, '"scale" must be a positive number'),
        (_is_number(config.get('shift', 0.0)), '"shift" must be a number'),
        (isinstance(provenance, dict) and isinstance(provenance.get('sha256'), str),
         '"provenance.sha256" must be the sha256 of the weights'),
    ] if not holds]
    if problems:
        raise UserError(f'{source} is not a valid VAE config: {"; ".join(problems)}.')
    return {'shift': 0.0, **config, 'vae': check_vae_arch(vae)}


def check_vae_target(path, overwrite: bool) -> None:
    """Refuses, before anything is read, an output that is in the way."""
    path = as_path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f'cannot write a VAE folder to {path}: a file of that name exists. Choose another name.')
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f'{path} exists and is not empty. Choose another folder, or ask for it to be overwritten.')
    if not is_vae_folder(path):
        raise UserError(f'{path} is not a VAE folder, so it will not be overwritten. Choose another folder.')


def params_sha256(params) -> str:
    """sha256 over names, shapes and little-endian float32 values of all leaves, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.named_leaves(params).items()):
        values = np.ascontiguousarray(leaf, '<f4')
        digest.update(f'{name} {list(values.shape)}\n'.encode())
        digest.update(values)
    return digest.hexdigest()


def _read_checked(path: epath.Path) -> dict:
    config = read_vae_config(path)
    check_whole(path, 'VAE folder', 'VAE')
    return config


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
