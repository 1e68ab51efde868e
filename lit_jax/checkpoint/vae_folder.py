"""VAE folders: an autoencoder on disk, written by convert_torch_ckpt.py and by training.

    config.json     kind 'vae', architecture, id, scale (and shift) of the latents, provenance with sha256
    arrays/         the parameters (Orbax)
    manifest.json   sizes and checksums of the files under arrays/

They are written and checked like model folders (`lit_jax.checkpoint.model_folder`)."""
from collections.abc import Callable

import jax
from etils import epath

from lit_jax.checkpoint.arrays import load_arrays
from lit_jax.checkpoint.model_folder import ARRAYS, check_whole, is_positive
from lit_jax.checkpoint.part_folder import Part, checked_arch
from lit_jax.models.layers import Array
from lit_jax.models.network import DTYPES
from lit_jax.models.vae import VaeNetwork, check_vae_arch
from lit_jax.runtime import leaves, peers
from lit_jax.runtime.errors import check_known
from lit_jax.runtime.paths import absolute, explain_unreachable

PART = Part('vae', 'VAE', 'Give a folder that convert_torch_ckpt.py wrote: python convert_torch_ckpt.py '
                          'DIFFUSERS_VAE --out models/sd_vae', hub_field='_class_name')


class Vae:
    """An autoencoder with its weights. A diffusion model works with x0 = scale · (latent - shift); `encode`
    and `decode` give and take the latent itself.

    Attributes:
        network: the `VaeNetwork`. params: its parameters (jax arrays, float32). config: of config.json.
        id: its name in data sets and models, e.g. 'stabilityai/sd-vae-ft-ema'.
        sha256: of the weights' source file. scale, shift: of the latents."""

    def __init__(self, network: VaeNetwork, params: dict, config: dict):
        self.network, self.params, self.config = network, params, config
        self.id: str = config['id']
        self.sha256: str = config['provenance']['sha256']
        self.scale: float = config['scale']
        self.shift: float = config['shift']
        self._encode = jax.jit(network.encode, static_argnames=('one_by_one',))
        self._decode = jax.jit(network.decode, static_argnames=('one_by_one', 'tile', 'overlap'))

    def encode(self, image_BHWC, **options) -> tuple[Array, Array]:
        """`VaeNetwork.encode`, compiled: images in [-1, 1] -> (mean, logvar)."""
        return self._encode(self.params, image_BHWC, **options)

    def decode(self, latent_BHWC, **options) -> Array:
        """`VaeNetwork.decode`, compiled: unscaled latents -> images, not clipped."""
        return self._decode(self.params, latent_BHWC, **options)


is_vae_folder, check_vae_target = PART.is_folder, PART.check_target


def save_vae_folder(path, config: dict, params, *, overwrite: bool = False) -> epath.Path:
    """Writes a VAE folder, all of it or nothing, and returns its path.

    config: {'vae': architecture, 'id', 'scale', 'provenance': {...}}, and 'shift' if there is one (see
    `Part.save`). params: nested dict of numpy or jax arrays. Raises UserError for a wrong config, parameters
    that do not fit it, a target that is in use, or a full disk."""
    return PART.save(path, {'shift': 0.0, **config}, params, check=check_vae_config, overwrite=overwrite,
                     abstract=lambda config: VaeNetwork(config['vae']).abstract())


def load_vae(path, dtype: str = 'float32', shard: Callable | None = None) -> Vae:
    """A ready VAE from its folder, local or in a bucket (gs://...). Called by all processes together.

    dtype: 'float32' or 'bfloat16', to compute in. shard: tree -> shardings; None: the first device."""
    check_known('dtype', dtype, DTYPES)
    path = absolute(path)
    with explain_unreachable(path):
        config = peers.together(lambda: _read_checked(path))
        network = VaeNetwork(config['vae'], dtype=DTYPES[dtype])
        abstract = network.abstract()
        if shard is not None:
            abstract = leaves.placed(abstract, shard(abstract))
        return Vae(network, load_arrays(path / ARRAYS, abstract), config)


def read_vae_config(path) -> dict:
    """Reads and checks config.json of a VAE folder, without its arrays."""
    return PART.read_config(path, check_vae_config)


def check_vae_config(config, source: str) -> dict:
    """The config with its architecture complete, or one UserError that lists what is wrong in `source`."""
    PART.check_fields(config, source, lambda config: [
        (isinstance(config.get('vae'), dict), '"vae" must hold the architecture'),
        (is_positive(config.get('scale')), '"scale" must be a positive number'),
        (_is_number(config.get('shift', 0.0)), '"shift" must be a finite number')])
    return {'shift': 0.0, **config, 'vae': checked_arch(check_vae_arch, config['vae'], source)}


def _read_checked(path: epath.Path) -> dict:
    config = read_vae_config(path)
    check_whole(path, 'VAE folder', 'VAE')
    return config


def _is_number(value) -> bool:
    return value == 0 or is_positive(value) or isinstance(value, int | float) and is_positive(-value)
