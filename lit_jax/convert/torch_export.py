"""Writes model folders as `.safetensors` under the original PyTorch names, DiT's position table included;
PixArt-Σ also for diffusers, and any model with its PyTorch code (`lit_jax.convert.torch_student`).

The model folder's config is in the file's metadata, so that converting the file back restores everything:
heads, latent space, class names, diffusion."""
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lit_jax.checkpoint.load import load_weights, read_null_caption, read_weights_config
from lit_jax.checkpoint.model_folder import CONFIG, is_model_folder, load_model_folder
from lit_jax.checkpoint.projector_file import read_file as read_projectors
from lit_jax.convert.torch_files import METADATA_KEY
from lit_jax.convert.torch_hub import is_hub_pixart, pixart_hub_config
from lit_jax.convert.torch_import import Converted
from lit_jax.convert.torch_keys import (
    LABEL_TABLE,
    NULL_CAPTION,
    TRANSFORMS,
    ModelLeaf,
    file_leaves,
    model_leaves,
)
from lit_jax.convert.torch_pipeline import (
    HUB_WEIGHTS,
    INDEX,
    PIPELINE,
    PREFIX,
    UNSTEPPED,
    check_pipeline,
    recorded_settings,
    write_pipeline,
)
from lit_jax.convert.torch_student import MODELING, WEIGHTS, check_student, modeling_source
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.models.arch import mixers_of
from lit_jax.models.facts import has_null_class
from lit_jax.models.layers import position_table
from lit_jax.models.network import Network, count_parameters
from lit_jax.models.rotary import ROTARY, rotary_of
from lit_jax.runtime import leaves, storage, writers
from lit_jax.runtime.claim import check, claims_out
from lit_jax.runtime.errors import UserError, check_known
from lit_jax.runtime.json_file import sealed
from lit_jax.runtime.leaves import named_leaves
from lit_jax.runtime.paths import as_path, check_folder, explain_unwritable, local_path, prepare_place

LAYOUTS = ('original', 'diffusers', 'lit', 'peft')


def to_torch_state(params: Mapping, arch: Mapping, layout: str = 'original',
                   null_caption: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Parameter tree -> {torch name: contiguous float32 array}, in the order of DiT's state dict.

    layout: 'diffusers' for PixArt only. null_caption: of PixArt, for the original layout."""
    return {key: np.ascontiguousarray(value) for key, value in _tensors(params, arch, layout, null_caption)}


def torch_layout(arch: Mapping, layout: str = 'original', null: bool = True) -> dict[str, tuple[int, ...]]:
    """{torch name: shape} of a model, DiT's `pos_embed` first. null: with PixArt's null caption."""
    shapes = {}
    if arch['family'] != 'pixart':
        shapes['pos_embed'] = 1, np.prod(_grid(arch)).item(), arch['width']
    shapes |= {key: table.shape for key, table in _rotary(arch)}
    for keys, leaf, _ in _order(arch, layout, null):
        whole = leaf.torch_shape
        shapes |= dict.fromkeys(keys, (whole[0] // len(keys), *whole[1:]) if len(keys) > 1 else whole)
    return shapes


@claims_out
def export(src, out, *, layout: str = 'original', overwrite: bool = False, vae=None) -> Converted:
    """Writes a model folder or workdir as a .safetensors file or the folder of another layout, atomically.

    vae: of a pipeline of diffusers whose model draws latents, the folder of its AutoencoderKL."""
    src, out = as_path(src), local_path(out)
    check_folder(out.parent, f'--out {out}')
    check_known('layout', layout, LAYOUTS)
    if layout == 'peft':
        from lit_jax.convert.peft_adapter import export_adapter
        return export_adapter(src, out, overwrite=overwrite)
    if layout != 'original':
        return _export_folder(src, out, layout, overwrite, vae)
    if out.suffix != '.safetensors':
        raise UserError(f'--out {out} must end in .safetensors')
    if out.is_dir():
        raise UserError(f'{out} is a folder; give the path of a .safetensors file')
    if out.exists() and not overwrite:
        raise UserError(f'{out} exists already; give another --out, or --overwrite to replace it')
    config, params = load_arrays_of(src)
    null_caption, notes = _null_caption(src, config)
    export_params(out, config, params, null_caption, _projectors(src, config))
    return _exported(src, 'original', config, out, notes)


# What folders of each layout hold: files, or those of a pipeline.
FOLDERS = {'diffusers': ({CONFIG, HUB_WEIGHTS}, {INDEX, 'transformer', 'scheduler'}),
           'lit': ({CONFIG, WEIGHTS, MODELING},),
           'peft': ({'adapter_config.json', 'adapter_model.safetensors'},)}


def check_free(out: Path, layout: str, overwrite: bool) -> None:
    """Refuses an output that exists, before anything is read."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise UserError(f'{out} exists already; give another --out, or --overwrite to replace it')
        inside = {path.name for path in out.iterdir()} - {'vae', PIPELINE} if out.is_dir() else None
        if inside not in FOLDERS[layout]:
            raise UserError(f'{out} was not written by --layout {layout}, so it is not overwritten')


def _export_folder(src, out: Path, layout: str, overwrite: bool, vae) -> Converted:
    check_free(out, layout, overwrite)
    config, params = load_arrays_of(src)
    if layout == 'lit':
        export_student(out, config, params, _null_caption(src, config)[0], _projectors(src, config))
        return _exported(src, layout, config, out)
    if not is_hub_pixart(config['model']) or read_diffusion(config['diffusion']).kind == 'flow':
        export_pipeline(out, config, params, _null_caption(src, config)[0], vae)
        replaced = recorded_settings(config).method == UNSTEPPED
        note = f'the model is drawn with {UNSTEPPED}, which diffusers cannot step: the scheduler takes heun'
        return _exported(src, layout, config, out, (note,) if replaced else ())
    export_hub_folder(out, config, params, str(src))
    lost = ('diffusers keeps no null caption: its pipeline encodes the empty prompt each time',)
    return _exported(src, layout, config, out, lost)


def _null_caption(src, config: Mapping) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(features of the empty caption of a text model, a note if they are not known)."""
    if config['model'].get('family') != 'pixart':
        return None, ()
    null_caption = read_null_caption(src, config['provenance'].get('step'))
    note = 'no null caption is known: y_embedder.y_embedding is left out'
    return null_caption, (note,) if null_caption is None else ()


def _exported(src, layout: str, config: Mapping, out: Path, notes=()) -> Converted:
    weights, arch = (config.get('provenance') or {}).get('weights', 'state_dict'), config['model']
    return Converted(str(src), weights, layout, arch, count_parameters(Network(arch)), out, notes)


def load_arrays_of(src) -> tuple[dict, dict]:
    """(config, params); those of a model folder stay numpy arrays, half the memory of jax arrays."""
    if not is_model_folder(src):
        return load_weights(src)
    read_weights_config(src)      # before the weights: whether its model can be built
    return load_model_folder(src)


def _projectors(src, config: Mapping) -> dict[str, np.ndarray]:
    """REPA's, of a model folder."""
    return read_projectors(src) if config.get('projectors') and is_model_folder(src) else {}


def export_params(out: Path, config: Mapping, params: Mapping, null_caption=None,
                  more: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes parameters and config as one .safetensors file, atomically, one tensor at a time. more: further
    tensors."""
    write_whole(out, params, lambda path: _write_weights(path, config, params, 'original', null_caption,
                                                         more=more or {}))


def export_hub_folder(out: Path, config: Mapping, params: Mapping, name: str) -> None:
    """Writes a PixArt as a folder that diffusers loads, atomically. UserError if it has no such model."""
    hub = pixart_hub_config(config['model'], name)

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(hub, indent=2) + '\n')
        _write_weights(folder / HUB_WEIGHTS, config, params, 'diffusers')

    write_whole(out, params, write)


def export_student(out: Path, config: Mapping, params: Mapping, null_caption=None,
                   more: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a model as a folder with its PyTorch code, atomically. more: further tensors. UserError if there
    is no such code."""
    source = modeling_source(config['model'], flow=read_diffusion(config['diffusion']).kind == 'flow')

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(published(config), indent=2) + '\n')
        (folder / MODELING).write_text(source)
        _write_weights(folder / WEIGHTS, config, params, 'original', null_caption, more=more or {})

    write_whole(out, params, write)


def export_pipeline(out: Path, config: Mapping, params: Mapping, null_caption=None, vae=None) -> None:
    """Writes a model as a pipeline folder of diffusers, atomically. UserError without its VAE or its code."""
    check_student(config['model'])
    check_pipeline(config, vae)
    if config['model']['family'] == 'pixart' and null_caption is None:      # diffusers misses no tensor
        null_caption = np.zeros([config['model'][f'caption_{name}'] for name in ('tokens', 'channels')])

    def write_weights(path: Path) -> None:
        _write_weights(path, config, params, 'original', null_caption, PREFIX)

    write_whole(out, params, lambda folder: write_pipeline(folder, config, vae, write_weights))


def write_whole(out: Path, params: Mapping, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file or folder beside `out`, which it replaces when complete."""
    out = Path(out).absolute()
    temporary, needed = writers.sibling(out, 'partial'), leaves.tree_bytes(params) + (1 << 20)
    prepare_place(out)
    try:
        with explain_unwritable(out, needed):
            storage.check_free_space(out, needed)
            write(temporary)
        check()
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
        storage.fsync_path(out.parent)
    except OSError as error:
        raise UserError(f'{out} could not be written: {error.strerror}; nothing is left of it') from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def _write_weights(path: Path, config: Mapping, params: Mapping, layout: str, null_caption=None,
                   prefix: str = '', more: Mapping[str, np.ndarray] = MappingProxyType({})) -> None:
    arch, metadata = config['model'], {'format': 'pt', METADATA_KEY: json.dumps(sealed(published(config)))}
    with open(path, 'wb') as file:
        shapes = torch_layout(arch, layout, null_caption is not None)
        shapes = {prefix + name: shape for name, shape in shapes.items()}
        values = (value for _, value in _tensors(params, arch, layout, null_caption))
        write_safetensors(file, shapes | {key: value.shape for key, value in more.items()},
                          itertools.chain(values, more.values()), metadata)
        file.flush()
        os.fsync(file.fileno())


def published(config: Mapping) -> dict:
    """A config without the recipe of a workdir and paths of this machine, for the file's metadata."""
    fields = ('format', 'model', 'diffusion', 'latent', 'classes', 'text', 'sampling', 'projectors',
              'provenance')
    published = {name: config[name] for name in fields if name in config}
    if source := (config.get('provenance') or {}).get('source'):
        published['provenance'] = {**config['provenance'], 'source': Path(source).name}
    return published


def write_safetensors(file, layout: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray],
                      metadata: Mapping[str, str]) -> None:
    """Streams float32 tensors of `layout` (name -> shape) one by one; safetensors' writer copies them all."""
    header: dict = {'__metadata__': dict(metadata)}
    offset = 0
    for name, shape in layout.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {'dtype': 'F32', 'shape': list(shape), 'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for (name, shape), value in zip(layout.items(), values, strict=True):
        value = np.ascontiguousarray(value, dtype='<f4')
        check_finite(name, value)
        if value.shape != tuple(shape):
            raise ValueError(f'a tensor of shape {value.shape} where the header says {shape}')
        file.write(value.data)


def check_finite(name: str, value: np.ndarray) -> None:
    """UserError for a weight that no export takes."""
    if not np.isfinite(value).all():
        raise UserError(f'{name} holds NaN or infinity: nothing is written. Take an earlier checkpoint')


def _order(arch: Mapping, layout: str, null: bool) -> Iterator[tuple[tuple[str, ...], ModelLeaf, int | None]]:
    """(keys, leaf, layer of the leaf) of every tensor but the position table, in DiT's order. Several keys
    are the parts of one tensor along its first axis."""
    leaves = file_leaves(arch) if null and layout == 'original' else model_leaves(arch)
    stacked = [leaf for leaf in leaves if leaf.blocks is not None]
    first = leaves.index(stacked[0])
    for leaf in leaves[:first]:
        yield leaf.rule.keys(layout), leaf, None
    for block in range(max(leaf.blocks.stop for leaf in stacked)):
        for leaf in stacked:
            if block in leaf.blocks:
                keys = tuple(key.replace('{i}', str(block)) for key in leaf.rule.keys(layout))
                yield keys, leaf, block - leaf.blocks.start
    for leaf in leaves[first:]:
        if leaf.blocks is None:
            yield leaf.rule.keys(layout), leaf, None


def _tensors(params: Mapping, arch: Mapping, layout: str,
             null_caption: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """(key, values) of every tensor, DiT's `pos_embed` first; checks that the leaves are those of `arch`."""
    flat, paths = named_leaves(params), {leaf.path for leaf in model_leaves(arch)}
    if paths != set(flat):
        raise UserError(f'the parameters do not fit the architecture: missing {sorted(paths - set(flat))}, '
                        f'unexpected {sorted(set(flat) - paths)}')
    if arch['family'] != 'pixart':
        yield 'pos_embed', position_table(_grid(arch), arch['width'])[None]
    yield from _rotary(arch)
    flat[NULL_CAPTION] = null_caption
    if not has_null_class(arch):
        flat[LABEL_TABLE] = flat[LABEL_TABLE][:-1]
    for keys, leaf, layer in _order(arch, layout, null_caption is not None):
        values = flat[leaf.path] if layer is None else flat[leaf.path][layer]
        whole = TRANSFORMS[leaf.rule.transform].to_torch(np.asarray(values, dtype=np.float32))
        yield from zip(keys, [whole] if len(keys) == 1 else np.split(whole, len(keys)), strict=True)


def _rotary(arch: Mapping) -> list[tuple[str, np.ndarray]]:
    """LightningDiT's buffers, where the mixer turns queries and keys."""
    return list(zip(ROTARY, rotary_of(arch, mixers_of(arch)) or (), strict=False))


def _grid(arch: Mapping) -> tuple[int, int]:
    return tuple(side // arch['patch'] for side in arch['input_size'])
