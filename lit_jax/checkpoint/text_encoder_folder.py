"""Text encoder folders: a T5 encoder with its tokenizer on disk, written by convert_torch_ckpt.py.

    config.json     kind 'text_encoder', architecture, id, form of the weights, provenance with sha256
    arrays/         the parameters (Orbax): float32, bfloat16, or int8 with scales
    tokenizer.json or spiece.model
    manifest.json   sizes and checksums of the files under arrays/ and of the tokenizer

They are written and checked like model folders (`lit_jax.checkpoint.model_folder`)."""
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from lit_jax.checkpoint.arrays import Rows, each_rows, load_arrays
from lit_jax.checkpoint.model_folder import ARRAYS, check_whole
from lit_jax.checkpoint.part_folder import Part, checked_arch
from lit_jax.models.layers import Array
from lit_jax.models.network import DTYPES
from lit_jax.models.t5 import WEIGHTS, T5Network, check_t5_arch, quantise
from lit_jax.runtime import leaves, peers
from lit_jax.runtime.errors import UserError, check_known, shown
from lit_jax.runtime.leaves import unflatten
from lit_jax.runtime.paths import absolute, explain_unreachable
from lit_jax.text.tokenizer import FILES, Tokenizer, missing_tokenizer

# Kernels of the blocks, and how many of their axes (after that of the layers) are multiplied with.
KERNELS = {'blocks/attn/qkv/kernel': 1, 'blocks/attn/proj/kernel': 2, 'blocks/mlp/gate/kernel': 1,
           'blocks/mlp/down/kernel': 1}
EMBEDDING = 'embed/table'
_quantise = jax.jit(quantise, static_argnums=1)
PART = Part('text_encoder', 'text encoder', 'Give a folder written by python convert_torch_ckpt.py '
            'PIPELINE/text_encoder --out models/t5', hub_field='model_type')


class TextEncoder:
    """A text encoder with its weights and tokenizer (see `lit_jax.text.encoder.encode_captions`).

    Attributes:
        network: the `T5Network`. params: its parameters (jax arrays). config: of config.json.
        id: its name in models and cached features. sha256: of the weights it was converted from.
        weights: dtype of `params`, 'float32', 'bfloat16' or 'int8' (changes features by about 0.5 %: compare
            features only with equal sha256 and weights). width: channels of the features. tokenizer: the
            `Tokenizer`."""

    def __init__(self, network: T5Network, params: dict, config: dict, tokenizer: Tokenizer):
        self.network, self.params, self.config, self.tokenizer = network, params, config, tokenizer
        self.id: str = config['id']
        self.sha256: str = config['provenance']['sha256']
        self.weights, self.width = network.weights, network.width
        self._encode = jax.jit(network.apply, compiler_options=network.inference_options())

    def encode(self, ids_BL, mask_BL) -> Array:
        """`T5Network.apply`, compiled: int32 [B, L] twice -> features [B, L, C] in the compute dtype."""
        return self._encode(self.params, ids_BL, mask_BL)


is_text_encoder_folder, check_text_encoder_target = PART.is_folder, PART.check_target


def save_text_encoder_folder(path, config: Mapping, params, tokenizer: Tokenizer, *,
                             overwrite: bool = False) -> epath.Path:
    """Writes a text encoder folder, all of it or nothing, and returns its path.

    config: {'text_encoder': architecture, 'id', 'provenance': {...}}; default for 'weights': the dtype of
    `params` (see `Part.save`). params: nested dict of numpy or jax arrays as `T5Network(arch, weights=...)`
    has them. Raises UserError for a wrong config, parameters that do not fit it, a tokenizer with more tokens
    than the embedding has rows, a target in use, or a full disk."""
    def check(config: dict, source: str) -> dict:
        config = check_text_encoder_config(config, source)
        check_vocabulary(tokenizer, config['text_encoder'])
        return config

    def abstract(config: dict) -> dict:
        return T5Network(config['text_encoder'], weights=config['weights']).abstract()

    kernel = leaves.named_leaves(params).get('blocks/mlp/gate/kernel')
    weights = 'float32' if kernel is None else np.dtype(kernel.dtype).name
    config = {'weights': weights, 'tokenizer': tokenizer.file, **config}
    return PART.save(path, config, params, check=check, overwrite=overwrite, by_layer=True,
                     files={tokenizer.file: tokenizer.content}, abstract=abstract)


def load_text_encoder(path, dtype: str = 'bfloat16', shard: Callable | None = None,
                      compute: str | None = None) -> TextEncoder:
    """A ready text encoder from its folder, local or in a bucket. Called by all processes together.

    dtype: compute dtype, 'bfloat16' or 'float32'; weights keep their stored dtype, except that float32
    becomes bfloat16 for 'bfloat16'. 'int8': int8 weights, rounded here, array by array, if stored otherwise.
    shard: abstract tree -> tree of shardings of the parameters; None: the first device. compute: another
    compute dtype than `dtype`; default for 'int8': bfloat16, on CPU float32."""
    if dtype not in WEIGHTS:
        raise UserError(f'unknown dtype {shown(dtype)} of a text encoder; known: {", ".join(WEIGHTS)}')
    if not compute:
        compute = dtype if dtype != 'int8' else 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    check_known('compute dtype', compute, DTYPES)
    path = absolute(path)
    with explain_unreachable(path):
        config = peers.together(lambda: _read_checked(path))
        stored = config['weights']
        weights = dtype if dtype == 'int8' or (stored, dtype) == ('float32', 'bfloat16') else stored
        network = T5Network(config['text_encoder'], DTYPES[compute], weights)
        abstract = network.abstract()
        if shard is not None:
            abstract = leaves.placed(abstract, shard(abstract))
        if weights == stored and shard is not None:
            params = load_arrays(path / ARRAYS, abstract)      # each process reads its own parts
        else:
            other = None if weights == stored else weights
            params = peers.together(lambda: _load_in_turn(path / ARRAYS, abstract, other))
        tokenizer = peers.together(lambda: Tokenizer.load(path))
        check_vocabulary(tokenizer, config['text_encoder'])
        return TextEncoder(network, params, config, tokenizer)


def _load_in_turn(arrays: epath.Path, abstract, weights: str | None) -> dict:
    """The stored parameters, as `weights` if given, by rows: whole arrays take 2-3 times their 2 GB."""
    flat, expected, first = {}, leaves.named_leaves(abstract), SingleDeviceSharding(jax.local_devices()[0])
    for rows in each_rows(arrays):
        for path, values in _in_form(rows, weights).items():
            sharding = getattr(expected.get(path), 'sharding', None) or first
            flat[path] = _place(values, rows, flat.get(path), sharding)
        del rows, values        # before the next is read
    leaves.check_leaves(flat, expected, str(arrays))
    return unflatten(flat)


def _in_form(rows: Rows, weights: str | None) -> dict[str, np.ndarray]:
    if weights is None:
        return {rows.name: rows.values}
    return pack(rows.name, rows.values if rows.name in KERNELS else [rows.values], len(rows.values), weights)


def _place(values: np.ndarray, rows: Rows, whole: Array | None, sharding) -> Array:
    """The array with these values at `rows`: `whole`, whose buffer is reused, or at first a new one."""
    if rows.are_all:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    if whole is None:
        whole = jax.jit(lambda: jnp.zeros((rows.length, *values.shape[1:]), values.dtype),
                        out_shardings=sharding)()
    return _row_setter(sharding)(whole, values, rows.start)


@functools.cache
def _row_setter(sharding) -> Callable[[Array, np.ndarray, int], Array]:
    return jax.jit(lambda whole, rows, start: jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0),
                   donate_argnums=0, out_shardings=sharding)


def pack(path: str, parts: Iterable[np.ndarray], depth: int, weights: str) -> dict[str, np.ndarray]:
    """One leaf in the form `weights`: {path: array}, with int8 kernels {path: int8, '.../scale': float32}.

    parts: of a kernel (KERNELS) one float array for each of the `depth` layers; of another leaf the leaf."""
    if path not in KERNELS:
        narrow = path == EMBEDDING and weights != 'float32'
        return {path: np.ascontiguousarray(next(iter(parts)), jnp.bfloat16 if narrow else np.float32)}
    whole: dict[str, np.ndarray] = {}
    for layer, part in enumerate(parts):
        for name, values in _forms(path, part, weights).items():
            if name not in whole:
                whole[name] = np.empty((depth, *values.shape), values.dtype)
            whole[name][layer] = values
    return whole


def _forms(path: str, kernel: np.ndarray, weights: str) -> dict[str, np.ndarray]:
    if weights != 'int8':
        return {path: np.asarray(kernel, jnp.dtype(weights))}
    values, scale = _quantise(np.asarray(kernel, np.float32), KERNELS[path])
    return {path: np.asarray(values), path.removesuffix('kernel') + 'scale': np.asarray(scale)}


def read_text_encoder_config(path) -> dict:
    """Reads and checks config.json of a text encoder folder, without its arrays."""
    return PART.read_config(path, check_text_encoder_config)


def check_text_encoder_config(config, source: str) -> dict:
    """The config with its architecture complete, or one UserError that lists what is wrong in `source`."""
    PART.check_fields(config, source, lambda config: [
        (isinstance(config.get('text_encoder'), dict), '"text_encoder" must hold the architecture'),
        (config.get('weights') in WEIGHTS, f'"weights" must be one of {", ".join(WEIGHTS)}'),
        (config.get('tokenizer') in FILES, f'"tokenizer" must be one of {", ".join(FILES)}')])
    return {**config, 'text_encoder': checked_arch(check_t5_arch, config['text_encoder'], source)}


def check_vocabulary(tokenizer: Tokenizer, arch: Mapping) -> None:
    """Refuses a tokenizer with ids beyond the embedding."""
    if tokenizer.size > arch['vocab']:
        raise UserError(f'the tokenizer has {tokenizer.size} tokens, the embedding of the text encoder '
                        f'{arch["vocab"]} rows. Give the tokenizer that it was trained with')


def _read_checked(path: epath.Path) -> dict:
    config = read_text_encoder_config(path)
    check_whole(path, 'text encoder folder', 'text encoder')
    if not any((path / name).is_file() for name in FILES):
        raise UserError(missing_tokenizer(path))
    return config
