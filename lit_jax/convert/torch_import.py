"""Converts PyTorch checkpoints to model folders.

Each source tensor and each leaf of the parameter tree is accounted for; one error lists all that is missing,
unexpected, misshaped, duplicated, of a wrong dtype or not finite. Leaves are filled one by one, and the
mapped file is released after each, so that a conversion needs little more memory than the weights."""
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_jax import __version__
from lit_jax.checkpoint.model_folder import check_target, is_model_folder, save_model_folder
from lit_jax.convert import torch_arch
from lit_jax.convert.torch_arch import Inferred
from lit_jax.convert.torch_files import FLOATS, Source, open_source, source_from_arrays
from lit_jax.convert.torch_flow import find_diffusion, take_projectors
from lit_jax.convert.torch_hub import pipeline_vae
from lit_jax.convert.torch_keys import (
    LABEL_TABLE,
    NULL_CAPTION,
    POSITION_KEYS,
    TRANSFORMS,
    ModelLeaf,
    file_leaves,
)
from lit_jax.convert.torch_pixart import has_null_caption, text_section
from lit_jax.convert.torch_survey import Hints, find_layout, split_key, survey
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.models.arch import check_arch, conditioning, mixers_of
from lit_jax.models.facts import has_null_class
from lit_jax.models.layers import position_table
from lit_jax.models.network import Network, count_parameters
from lit_jax.models.rotary import ROTARY, rotary_of
from lit_jax.recipes.recipe import VA_VAE as RECIPE_VA_VAE
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, listed, shown_name
from lit_jax.runtime.leaves import unflatten
from lit_jax.runtime.paths import as_path, file_sha256, local_path

SD_VAE = {'space': 'vae', 'vae': 'stabilityai/sd-vae-ft-ema', 'scale': 0.18215, 'downscale': 8}     # DiT
SDXL_VAE = {'space': 'vae', 'vae': 'stabilityai/sdxl-vae', 'scale': 0.13025, 'downscale': 8}    # PixArt-Σ
VA_VAE = {'space': 'vae', **{name: RECIPE_VA_VAE[name] for name in ('vae', 'scale', 'downscale')}}
PIXELS = {'space': 'pixels', 'vae': None, 'scale': 1.0, 'downscale': 1}


@dataclass(frozen=True)
class Converted:
    """The result of a conversion, for the summary."""
    source: str
    weights: str
    layout: str
    arch: dict
    parameters: int
    out: Path
    notes: tuple[str, ...] = ()
    latent: Mapping | None = None
    diffusion: Mapping | None = None
    assumed: tuple[str, ...] = ()      # fields of latent that neither file nor caller said
    why: str = ''                      # this diffusion, where the file does not say it


@dataclass
class _Problems:
    """Problems of tensors, reported together: equal ones of several blocks become one line."""
    blocks: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def add(self, kind: str, key: str, detail: str = '') -> None:
        pattern, layer = split_key(key)
        self.blocks.setdefault((kind, pattern, detail), []).extend([] if layer is None else [layer])

    def lines(self) -> list[str]:
        return [f'{kind} tensor: {shown_name(pattern).replace("{i}", _ranges(layers))}' +
                (f' {detail}' if detail else '')
                for (kind, pattern, detail), layers in self.blocks.items()]


def from_torch_state(state: Mapping, arch: Mapping | None = None, **hints) -> tuple[dict, dict]:
    """A PyTorch state dict (as numpy arrays) -> (arch, parameter tree of float32 numpy arrays).

    state: tensors under their original or diffusers names; `pos_embed` may be absent if the size is given.
    arch: the architecture; None infers it (hints: fields of `Hints`). Raises UserError
    that names every tensor that is wrong."""
    source = source_from_arrays(state)
    take_projectors(source, 'the state dict')
    inferred = _known(arch) if arch else torch_arch.infer_arch(source, 'the state dict', Hints(**hints))
    return inferred.arch, read_params(source, inferred, 'the state dict')[0]


def _known(arch: Mapping) -> Inferred:
    return Inferred(torch_arch.plain_arch(check_arch(arch)))


def read_params(source: Source, inferred: Inferred, name: str) -> tuple[dict, np.ndarray | None]:
    """(parameter tree of `source`, PixArt's null caption or None), or one UserError with everything wrong."""
    arch, layout, problems = inferred.arch, find_layout(source.tensors, name), _Problems()
    if arch['depth'] > len(source.tensors):     # before tables of so many blocks are made
        raise UserError(f'{name} describes {arch["depth"]} blocks, but has only {len(source.tensors)} '
                        f'tensors; the file is damaged')
    try:
        leaves = file_leaves(arch)
    except UserError as error:
        raise UserError(f'{name} does not hold a whole model:'
                        f'{listed([*inferred.problems, str(error)])}') from error
    reading = _Reading(source, layout, arch, problems)
    if not has_null_caption(source):
        leaves = [leaf for leaf in leaves if leaf.path != NULL_CAPTION]
    flat = {leaf.path: reading.read_leaf(leaf) for leaf in leaves}
    if 'input_size' not in inferred.unknown:
        reading.check_positions()
        reading.check_rotary()
    reading.used.update((POSITION_KEYS[layout], *ROTARY))
    for key in source.tensors:
        if key not in reading.used:
            problems.add('unexpected', key)
    if lines := [*inferred.problems, *source.problems, *problems.lines()]:
        raise UserError(f'{name} does not hold a whole model (depth {arch["depth"]}, width {arch["width"]}, '
                        f'{arch["mixer"]["name"]} attention):' + listed(lines))
    null_caption = flat.pop(NULL_CAPTION, None)
    if not has_null_class(arch):        # the file has no row for it, ours is never used
        flat[LABEL_TABLE] = np.pad(flat[LABEL_TABLE], ((0, 1), (0, 0)))
    return unflatten(flat), null_caption


class _Reading:
    """Fills leaves from a source; notes which tensors were used and what was wrong with them."""

    def __init__(self, source: Source, layout: str, arch: Mapping, problems: _Problems):
        self.source, self.layout, self.arch, self.problems = source, layout, arch, problems
        self.used: set[str] = set()

    def read_leaf(self, leaf: ModelLeaf) -> np.ndarray:
        """All layers of one leaf, float32."""
        patterns = leaf.rule.keys(self.layout)
        if not patterns:
            self.problems.add('missing', leaf.rule.original, '(this layout has no such tensor)')
            return np.empty(0, np.float32)
        layers = [[pattern.replace('{i}', str(block)) for pattern in patterns]
                  for block in leaf.blocks or (0,)]
        shape = leaf.shape if leaf.blocks is None else (len(layers), *leaf.shape)
        # Only what the file holds is allocated: its numbers may be damaged.
        fits = all(self._shape(key) == self._part(leaf, keys) for keys in layers for key in keys)
        values = np.empty(shape if fits else 0, np.float32)
        for layer, keys in enumerate(layers):
            self._fill((values if leaf.blocks is None else values[layer]) if fits else None, leaf, keys)
        if leaf.blocks is None:
            self._check_copies(patterns)
        self.source.release()
        return values

    def _shape(self, key: str) -> tuple[int, ...] | None:
        info = self.source.tensors.get(key)
        return info and info.shape

    @staticmethod
    def _part(leaf: ModelLeaf, keys: list[str]) -> tuple[int, ...]:
        """The shape of each of the tensors that are joined along their first axis."""
        whole = leaf.torch_shape
        return (whole[0] // len(keys), *whole[1:]) if whole else ()

    def _fill(self, out: np.ndarray | None, leaf: ModelLeaf, keys: list[str]) -> None:
        """Writes one layer of a leaf into `out` from the tensors of `keys`, joined along their first axis."""
        tensors = [self._take(key, self._part(leaf, keys)) for key in keys]
        if out is not None and all(tensor is not None for tensor in tensors):
            joined = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
            out[...] = TRANSFORMS[leaf.rule.transform].to_leaf(joined, out.shape)

    def _take(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The tensor's float32 values, or None with the problem noted."""
        info = self.source.tensors.get(key)
        self.used.add(key)
        if info is None:
            self.problems.add('missing', key)
            return None
        if info.shape != shape:
            self.problems.add('misshaped', key, f'has {info.shape}, expected {shape}')
        if info.dtype not in FLOATS:
            self.problems.add('wrong dtype in', key, f'is {info.dtype}, expected one of {", ".join(FLOATS)}')
            return None
        values = self.source.read(key)
        if not np.isfinite(values).all():
            self.problems.add('non-finite values in', key)
        return values if info.shape == shape else None

    def _check_copies(self, patterns: tuple[str, ...]) -> None:
        """diffusers' embedders are repeated in every block: to be folded into one, all must be equal."""
        for pattern in patterns:
            if '{i}' not in pattern or (first := pattern.replace('{i}', '0')) not in self.source.tensors:
                continue
            info, values = self.source.tensors[first], None
            for layer in range(1, self.arch['depth']):
                key = pattern.replace('{i}', str(layer))
                if (copy := self._take(key, info.shape)) is not None:
                    values = self.source.read(first) if values is None else values
                    if not np.array_equal(copy, values, equal_nan=True):
                        self.problems.add('differing', key, 'is not block 0\'s; DiT has one for all blocks')

    def check_positions(self) -> None:
        """A stored position table must equal the computed one; PixArt's is ignored."""
        key, size, patch = POSITION_KEYS[self.layout], self.arch['input_size'], self.arch['patch']
        if key not in self.source.tensors or self.arch['family'] == 'pixart':
            return
        grid, dtype = (size[0] // patch, size[1] // patch), self.source.tensors[key].dtype
        values = self._take(key, (1, grid[0] * grid[1], self.arch['width']))
        if values is None:
            return
        table = position_table(grid, self.arch['width'])
        if not np.abs(values[0] - table).max() <= torch_arch.POSITION_TOLERANCE[dtype]:
            self.problems.add('wrong', key, f'is not the sin-cos table of a {grid[0]}x{grid[1]} grid')


    def check_rotary(self) -> None:
        """Stored rotary tables must equal the computed ones."""
        tables = rotary_of(self.arch, mixers_of(self.arch))
        for key, table in zip(ROTARY, tables or (), strict=bool(tables)):
            if key in self.source.tensors and (values := self._take(key, table.shape)) is not None:
                tolerance = torch_arch.POSITION_TOLERANCE[self.source.tensors[key].dtype]
                if not np.abs(values - table).max() <= tolerance:
                    self.problems.add('wrong', key, 'is not the rotary table of this grid and these heads')


def _ranges(numbers: list[int]) -> str:
    """[0] -> '0'; [0, 1, 2, 5] -> '{0-2,5}'."""
    spans: list[list[int]] = []
    for number in sorted({*numbers}):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ','.join(str(a) if a == b else f'{a}-{b}' for a, b in spans)
    return text if len(spans) == 1 and spans[0][0] == spans[0][1] else '{' + text + '}'


@claims_out
def convert(src, out, *, weights: str = 'ema', heads: int | None = None, expected: Mapping | None = None,
            latent: Mapping | None = None, activation: str | None = None, focus_power: int | None = None,
            routed: tuple[int, ...] | None = None, cross_heads: int | None = None,
            system: str | None = None, overwrite: bool = False, source_name: str = '') -> Converted:
    """Reads the checkpoint `src` (file or diffusers folder) and writes the model folder `out`.

    Args:
        weights: 'ema' or 'model', for training checkpoints.
        heads, cross_heads, activation, focus_power, routed: what shapes do not show (`Hints`).
        expected: what the model must be (see `check_expected`); `input_size` or `image_size` also gives the
            size of a file without position table.
        latent: fields that differ from the guess (4 channels: the latents of Stable Diffusion's VAE, for text
            models of SDXL's; else pixels). overwrite: an existing model folder. source_name: in provenance.
        system: 'dit', 'sit', 'repa' or 'lightningdit', where neither the file nor its name tells.

    Raises UserError, before anything is written."""
    src, out, expected = local_path(src), as_path(out), dict(expected or {})
    check_target(out, overwrite, 'model', is_model_folder)
    if src.is_dir() and is_model_folder(src):
        raise UserError(f'{src} is a model folder already; --to_torch turns it into a PyTorch file')
    source = open_source(src, weights)
    diffusion, why = find_diffusion(source, src, system)
    projectors = take_projectors(source, src)
    given = dict(source.config or {})
    told = pipeline_vae(src) | {name: value for name, value in (latent or {}).items() if value is not None}
    latent_of = _latent(source, given, told, str(src))
    hints = Hints(heads=heads, input_size=_told_size(expected, latent_of['downscale']), activation=activation,
                  focus_power=focus_power, routed=routed, cross_heads=cross_heads,
                  num_classes=expected.get('num_classes'))
    if 'model' in given:
        inferred = _known(given['model'])
        inferred.problems.extend(torch_arch.hub_problems(inferred.arch, source.hub_config or {}))
    else:
        inferred = torch_arch.infer_arch(source, str(src), hints)
    arch = inferred.arch
    expected |= {'heads': heads, 'cross_heads': cross_heads, 'activation': activation,
                 'focus_power': focus_power}
    torch_arch.check_expected(arch, expected, str(src), latent_of['downscale'], inferred.unknown)
    params, null_caption = read_params(source, inferred, str(src))
    config = {'model': arch, 'diffusion': diffusion, 'latent': latent_of,
              'classes': given.get('classes', source.classes),
              'provenance': _provenance(src, source, given.get('provenance', {}), source_name)}
    if given.get('sampling'):
        config['sampling'] = given['sampling']
    notes = list(inferred.notes)
    if conditioning(arch) == 'text':
        config |= {'classes': None, 'text': text_section(arch, given.get('text'))}
        if null_caption is None:
            notes.append('the file has no null caption; the text encoder computes it from the empty prompt')
    elif config['classes'] and len(config['classes']) != arch['num_classes']:
        raise UserError(f'{src} names {len(config["classes"])} of its {arch["num_classes"]} classes')
    if projectors:
        depth = source.told.get('encoder_depth', (given.get('projectors') or {}).get('encoder_depth'))
        config['projectors'] = {'encoder_depth': depth}
        notes.append(f'{len(projectors) // 6} projectors of REPA are kept apart: they feed no sample')
    save_model_folder(out, config, params, null_caption=null_caption, projectors=projectors,
                      overwrite=overwrite)
    return Converted(str(src), source.weights, find_layout(source.tensors, str(src)), arch,
                     count_parameters(Network(arch)), out, tuple(notes), latent_of, config['diffusion'],
                     _assumed(given, told), why)


def _assumed(given: Mapping, told: Mapping) -> tuple[str, ...]:
    """What neither a file of ours nor the caller says of the latents."""
    said = {*(given.get('latent') or ()), *(name for name, value in told.items() if value is not None)}
    said |= {'space'} if 'vae' in said else set()
    return tuple(name for name in PIXELS if name not in said)


def describe(done: Converted) -> str:
    """The summary that the script prints."""
    arch, mixer = done.arch, done.arch['mixer']
    sides, size = 'x'.join(map(str, arch['input_size'])), torch_arch.size_name(arch)
    options = ', '.join(f'{name} {value}' for name, value in mixer.items() if name != 'name')
    return '\n'.join([
        f'read     {done.source} ({done.weights}, {done.layout} names)',
        f'model    {size}, patch {arch["patch"]}, {mixer["name"]} attention ({options})',
        f'input    {sides}x{arch["channels"]}, {_condition(arch)}',
        f'numbers  {done.parameters:,} parameters',
        *_describe_space(done),
        *(f'note     {note}' for note in done.notes),
        f'written  {done.out}'])


_SAY = {'vae': '--vae ID', 'scale': '--latent_scale S', 'downscale': '--downscale N',
        'space': '--space vae or pixels'}


def _describe_space(done: Converted) -> list[str]:
    """Latents and noise levels, and what of them is assumed."""
    if done.latent is None or done.diffusion is None:
        return []
    latent, diffusion = done.latent, done.diffusion
    text = f'pixels, scale {latent["scale"]:g}' if latent['space'] == 'pixels' else \
        f'of the VAE {latent["vae"]}, scale {latent["scale"]:g}, downscale {latent["downscale"]}'
    flags = [flag for name, flag in _SAY.items() if name in done.assumed and (
        latent['space'] == 'vae' or name in ('scale', 'space'))]
    lines = [f'latent   {text}' + (f' (assumed; otherwise {", ".join(flags)})' if flags else '')]
    kind = read_diffusion(diffusion)
    what = kind.describe() + (f' (assumed, {done.why}; otherwise --system)' if done.why else '')
    if kind.kind == 'ddpm':
        what = ('noise and its variance' if done.arch['learn_sigma'] else 'noise') + f'; {what}'
    return [*lines, f'predicts {what}']


def _condition(arch: Mapping) -> str:
    if conditioning(arch) == 'label':
        return f'{arch["num_classes"]} classes' + ('' if has_null_class(arch) else ', without a null class')
    extent = f'0..{arch["base_size"] / arch["pe_interpolation"]:g}'
    return (f'captions of {arch["caption_tokens"]} tokens x {arch["caption_channels"]}, '
            f'{arch["cross_heads"]} cross-attention heads; positions {extent}')


def tool_name() -> str:
    """'lit_jax 0.2.0', for provenance."""
    return f'lit_jax {__version__}'


def _latent(source: Source, given: Mapping, told: Mapping, name: str) -> dict:
    channels = given['model']['channels'] if 'model' in given else _channels(source)
    captions = given['model'].get('family') == 'pixart' if 'model' in given else survey(source, name).captions
    vae = VA_VAE if channels == 32 else SDXL_VAE if captions else SD_VAE
    guess = given.get('latent') or (vae if channels in (4, 32) else PIXELS)
    told = {key: value for key, value in told.items() if value is not None}
    if told.get('vae'):
        told.setdefault('space', 'vae')
    if told.get('space') and told['space'] != guess['space']:
        guess = {'vae': vae, 'pixels': PIXELS}[told['space']]
    return {**(vae if guess['space'] == 'vae' else PIXELS), **guess, **told}


def _channels(source: Source) -> int:
    keys = 'x_embedder.proj.weight', 'pos_embed.proj.weight'
    shapes = [source.tensors[key].shape for key in keys if key in source.tensors]
    return next((shape[1] for shape in shapes if len(shape) == 4), 0)      # 0: inference reports it


def _told_size(expected: Mapping, downscale: int) -> tuple[int, int] | None:
    if size := expected.get('input_size'):
        return tuple(size)
    if size := expected.get('image_size'):
        return (size // downscale, size // downscale)
    return None


def _provenance(src: Path, source: Source, given: Mapping, name: str) -> dict:
    """Where the weights come from, with the training step if the file has it."""
    digests = {path.name: file_sha256(path) for path in source.files}
    name = name or os.path.basename(os.path.abspath(src))
    return {'source': name, 'weights': source.weights, 'tool': tool_name(),
            'sha256': next(iter(digests.values())) if len(digests) == 1 else digests,
            **({'step': given['step']} if 'step' in given else {})}
