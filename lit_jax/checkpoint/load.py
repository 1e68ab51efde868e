"""Loading a model from wherever it lies: a model folder or a training workdir."""
from pathlib import Path

import jax
import jax.numpy as jnp

from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.model_folder import is_model_folder, load_model_folder, read_config
from lit_jax.errors import UserError
from lit_jax.models.network import DTYPES, Model, Network
from lit_jax.checkpoint.workdir import is_workdir, read_workdir


def load(path, *, dtype='float32', scan_layers: bool = True) -> Model:
    """A ready model from a model folder, or from a workdir (newest whole checkpoint, EMA weights).

    Args:
        path: what `convert_torch_ckpt.py` or `train.py` wrote.
        dtype: compute dtype, 'float32' or 'bfloat16'.
        scan_layers: loop over the blocks, or unroll them (longer to compile, often faster on CPU).

    Returns:
        `model(x, t, y)`: x [B, H, W, C], t in 0..999, y class indices -> [B, H, W, 2C], noise first.

    Raises:
        UserError: nothing loadable there, damaged files, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f'unknown dtype {dtype!r}; known: {", ".join(DTYPES)}')
    config, params = load_weights(path)
    network = Network(config['model'], dtype=DTYPES[dtype], scan_layers=scan_layers)
    return Model(network, params, config)


def load_weights(path, sharding: jax.sharding.Sharding | None = None) -> tuple[dict, dict]:
    """(config, params) of a model folder or workdir; params in float32, laid out by `sharding` (default: one device)."""
    path = Path(path)
    if is_model_folder(path):
        return load_model_folder(path, _abstract(read_config(path), sharding))
    if is_workdir(path):
        config = read_workdir(path)
        checkpoints = Checkpoints(path)
        try:
            params, step = checkpoints.restore_part('ema', _abstract(config, sharding))
        finally:
            checkpoints.close()
        config['provenance'] = {'source': str(path), 'weights': 'ema', 'step': step}
        return config, params
    if not path.exists():
        raise UserError(f'{path} does not exist; expected a model folder (python convert_torch_ckpt.py SRC --out {path}) '
                        'or a workdir of train.py')
    raise UserError(f'{path} is neither a model folder (config.json and arrays/) nor a workdir (config.json and '
                    'checkpoints/)')


def _abstract(config: dict, sharding) -> dict:
    abstract = Network(config['model']).abstract()
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding), abstract)
