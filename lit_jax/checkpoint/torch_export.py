"""Model folders -> `.safetensors` under the original PyTorch names, position table included.

The model folder's config travels in the file's metadata, so that converting the file back restores everything: heads,
latent space, class names, diffusion.
"""
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lit_jax.checkpoint import leaves, storage
from lit_jax.checkpoint.leaves import named_leaves
from lit_jax.checkpoint.load import load_weights
from lit_jax.checkpoint.model_folder import is_model_folder, load_model_folder
from lit_jax.checkpoint.torch_files import METADATA_KEY
from lit_jax.checkpoint.torch_import import Converted
from lit_jax.checkpoint.torch_keys import TRANSFORMS, ModelLeaf, model_leaves
from lit_jax.errors import UserError
from lit_jax.models.layers import position_table
from lit_jax.paths import as_path, local_path


def to_torch_state(params: Mapping, arch: Mapping) -> dict[str, np.ndarray]:
    """Parameter tree -> {original torch name: contiguous float32 array}, in the order of DiT's state dict."""
    return {key: np.ascontiguousarray(value) for key, value in _tensors(params, arch)}


def torch_layout(arch: Mapping) -> dict[str, tuple[int, ...]]:
    """{original torch name: shape} of a model, `pos_embed` first, without any weights."""
    shapes = {'pos_embed': (1, np.prod(_grid(arch)).item(), arch['width'])}
    return shapes | {key: leaf.torch_shape for key, leaf, _ in _order(arch)}


def export(src, out, *, overwrite: bool = False) -> Converted:
    """Writes the model folder or workdir `src` as the file `out` (.safetensors).

    The file is written beside its place and renamed when it is whole.
    """
    src, out = as_path(src), local_path(out)
    if out.suffix != '.safetensors':
        raise UserError(f'--out {out} must end in .safetensors')
    if out.is_dir():
        raise UserError(f'{out} is a folder; give the path of a .safetensors file')
    if out.exists() and not overwrite:
        raise UserError(f'{out} exists already; give another --out, or --overwrite to replace it')
    config, params = _load(src)
    export_params(out, config, params)
    count = sum(int(np.prod(leaf.shape)) for leaf in named_leaves(params).values())
    weights = (config.get('provenance') or {}).get('weights', 'state_dict')
    return Converted(str(src), weights, 'original', config['model'], count, out)


def _load(src) -> tuple[dict, dict]:
    """(config, params); a model folder's stay numpy arrays, which needs half the memory of jax arrays."""
    return load_model_folder(src) if is_model_folder(src) else load_weights(src)


def export_params(out: Path, config: Mapping, params: Mapping) -> None:
    """Writes parameters and config as one .safetensors file, atomically, one tensor at a time."""
    arch, out = config['model'], Path(out).absolute()
    temporary, needed = storage.sibling(out, 'partial'), leaves.tree_bytes(params) + (1 << 20)
    metadata = {'format': 'pt', METADATA_KEY: json.dumps(_published(config))}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with storage.explain_full_disk(out, needed):
            storage.check_free_space(out, needed)
            with open(temporary, 'wb') as file:
                write_safetensors(file, torch_layout(arch), (value for _, value in _tensors(params, arch)), metadata)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, out)
        storage.fsync_path(out.parent)
    except OSError as error:
        raise UserError(f'{out} could not be written: {error.strerror}; nothing is left of it') from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _published(config: Mapping) -> dict:
    """What of a config travels in the file: no recipe of a workdir, no paths of the machine that wrote it."""
    fields = ('format', 'model', 'diffusion', 'latent', 'classes', 'provenance')
    published = {name: config[name] for name in fields if name in config}
    if source := (config.get('provenance') or {}).get('source'):
        published['provenance'] = {**config['provenance'], 'source': Path(source).name}
    return published


def write_safetensors(file, layout: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray],
                      metadata: Mapping[str, str]) -> None:
    """Streams float32 tensors into an open binary file, one at a time (safetensors' own writer copies them all).

    Args:
        layout: name -> shape of every tensor, in the order of `values`.
    """
    header: dict = {'__metadata__': dict(metadata)}
    offset = 0
    for name, shape in layout.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {'dtype': 'F32', 'shape': list(shape), 'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for shape, value in zip(layout.values(), values, strict=True):
        value = np.ascontiguousarray(value, dtype='<f4')
        if value.shape != tuple(shape):
            raise ValueError(f'a tensor of shape {value.shape} where the header says {shape}')
        file.write(value.data)


def _order(arch: Mapping) -> Iterator[tuple[str, ModelLeaf, int | None]]:
    """(key, leaf, layer of the leaf) of every tensor but the position table, as DiT's state dict orders them."""
    leaves = model_leaves(arch)
    stacked = [leaf for leaf in leaves if leaf.blocks is not None]
    first = leaves.index(stacked[0])
    for leaf in leaves[:first]:
        yield leaf.rule.original, leaf, None
    for block in range(max(leaf.blocks.stop for leaf in stacked)):
        for leaf in stacked:
            if block in leaf.blocks:
                yield leaf.rule.original.replace('{i}', str(block)), leaf, block - leaf.blocks.start
    for leaf in leaves[first:]:
        if leaf.blocks is None:
            yield leaf.rule.original, leaf, None


def _tensors(params: Mapping, arch: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """(key, values) of every tensor, `pos_embed` first; checks that the tree has exactly the leaves of `arch`."""
    flat, paths = named_leaves(params), {leaf.path for leaf in model_leaves(arch)}
    if paths != set(flat):
        raise UserError(f'the parameters do not fit the architecture: missing {sorted(paths - set(flat))}, unexpected '
                        f'{sorted(set(flat) - paths)}')
    yield 'pos_embed', position_table(_grid(arch), arch['width'])[None]
    for key, leaf, layer in _order(arch):
        values = flat[leaf.path] if layer is None else flat[leaf.path][layer]
        yield key, TRANSFORMS[leaf.rule.transform].to_torch(np.asarray(values, dtype=np.float32))


def _grid(arch: Mapping) -> tuple[int, int]:
    return tuple(side // arch['patch'] for side in arch['input_size'])
