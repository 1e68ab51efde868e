"""Infers the architecture of a checkpoint from its tensors, and compares it with the one asked for."""
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lit_jax.convert.torch_files import Source
from lit_jax.convert.torch_hub import hub_sizes
from lit_jax.convert.torch_keys import POSITION_KEYS
from lit_jax.convert.torch_mixers import infer_blocks, infer_ffn
from lit_jax.convert.torch_pixart import caption_hub_problems, infer_captions
from lit_jax.convert.torch_survey import READABLE, Found, Hints, survey
from lit_jax.models.arch import FAMILY_DEFAULTS, check_arch
from lit_jax.models.layers import position_table
from lit_jax.recipes.recipe import SIZES
from lit_jax.recipes.systems import SYSTEMS
from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.json_file import plain

# Largest error of a stored position table: other libraries' sines, and the rounding of values up to 1.
_IMAGENET = 1000
POSITION_TOLERANCE = {'float32': 1e-4, 'float16': 4e-4, 'bfloat16': 4e-3}


@dataclass(frozen=True)
class Inferred:
    """An inferred architecture; `unknown` fields are placeholders, `problems` errors, `notes` remarks."""
    arch: dict
    unknown: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# Letter, field of the architecture, and a placeholder if no tensor shows the size (reading will name those).
_SIZES = (('p', 'patch', 2), ('C', 'channels', 4))
_LABEL_SIZES, _CAPTION_SIZES = (('R', 'num_classes', 2),), (('Y', 'caption_channels', 8),)


def infer_arch(source: Source, name: str, hints: Hints) -> Inferred:
    """The architecture of the model in `source`, as far as its tensors and the hints tell.

    Raises UserError if it is no known model; other problems are returned, to be reported with the reading."""
    found, hub = survey(source, name), source.hub_config or {}
    sizes, unknown, notes = found.sizes, set(), []
    if not sizes.get('D'):
        raise UserError(f'{name} is no checkpoint of {READABLE}: no tensor shows the width of the model; '
                        f'expected tensors such as x_embedder.proj.bias and blocks.0.mlp.fc2.bias')
    for letter, field_name, placeholder in (*_SIZES, *(_CAPTION_SIZES if found.captions else _LABEL_SIZES),
                                            ('F', 'mlp_ratio', 4 * sizes['D']), ('O', 'learn_sigma', None)):
        if not sizes.get(letter):
            unknown.add(field_name)
            sizes[letter] = placeholder or 2 * sizes['p'] ** 2 * sizes['C']
    if not found.depth:
        unknown.add('depth')
    token, problems = sizes['p'] ** 2 * sizes['C'], []
    if sizes['O'] not in (token, 2 * token) and not {'patch', 'channels'} & unknown:
        problems.append(f'the final layer gives {sizes["O"]} numbers per token, expected {token} (patch² · '
                        f'channels) or twice that')
    blocks = infer_blocks(found, hints)
    mixer = blocks.mixer
    if found.captions:
        captions = infer_captions(source, found, hints, hub, mixer)
        family, notes = {'family': 'pixart', **captions.fields}, captions.notes
        unknown |= captions.unknown
        problems += captions.problems
    else:
        size, size_problems = _input_size(source, found, hints, hub)
        family = blocks.family | _classes(sizes['R'], source, hints, problems, notes) | {
            'input_size': size or (sizes['p'],) * 2}
        unknown |= {'input_size'} if size_problems else set()
        problems += size_problems
    if mixer['heads'] is None or blocks.problems:
        unknown.add('heads')
        if 'head_dim' not in mixer:     # the file shows neither
            mixer['heads'] = max(1, sizes['D'] // sizes['E']) if 'E' in sizes else 1
    ffn, ratio, ffn_problems = infer_ffn(found)
    arch = {**family, 'depth': found.depth or 1, 'width': sizes['D'], 'patch': sizes['p'],
            'channels': sizes['C'], 'mlp_ratio': ratio, 'learn_sigma': sizes['O'] != token, 'mixer': mixer,
            'ffn': ffn, **(_lightning(found) if family['family'] == 'dit' else {})}
    if 'stages' in FAMILY_DEFAULTS[arch['family']]:
        arch['stages'] = blocks.stages
    problems += blocks.problems + ffn_problems + hub_problems(arch, hub, unknown)
    return Inferred(plain_arch(arch if unknown or problems else check_arch(arch)), unknown, problems, notes)


def plain_arch(arch: Mapping) -> dict:
    """A copy of `arch` as it is stored: lists, not tuples."""
    return plain(arch)


def _lightning(found: Found) -> dict:
    """LightningDiT's norm with a gain, and blocks without a shift, where the file has them."""
    fields: dict = {'norm': 'rms'} if found.has('blocks.{i}.norm1.weight') else {}
    modulation = found.source.tensors.get('blocks.0.adaLN_modulation.1.bias')
    if modulation is not None and modulation.shape == (4 * found.sizes['D'],):
        fields['shift'] = False
    return fields


def _classes(rows: int, source: Source, hints: Hints, problems: list[str], notes: list[str]) -> dict:
    """num_classes, and null_class False where all rows of the label table are classes.

    A table has a row more only if its trainer dropped classes (`class_dropout_prob` above 0). That no tensor
    shows; the caller, the file's own command line or config.json know the number of classes."""
    told, hub = source.told.get('num_classes'), (source.hub_config or {}).get('num_embeds_ada_norm')
    said = next((count for count in (hints.num_classes, told, hub) if isinstance(count, int)), None)
    if rows == 1 or said == rows:
        notes.append('its label table has no row for the null class: it is drawn without guidance, and '
                     'teaches with train.label_dropout 0')
        return {'num_classes': rows, 'null_class': False}
    if said is None and rows != _IMAGENET + 1:
        notes.append(f'the {rows} rows of its label table are taken for {rows - 1} classes and the null '
                     f'class; if all are classes, give --num_classes {rows}')
    if said is not None and said == told != rows - 1:
        problems.append(f'it was trained with --num-classes {told}, but its label table has {rows} rows')
    return {'num_classes': rows - 1}


def _input_size(source: Source, found: Found, hints: Hints,
                hub: Mapping) -> tuple[tuple[int, int] | None, list[str]]:
    """Height and width of the latent: from the position table, the hub's config, or the caller."""
    key, patch = POSITION_KEYS[found.layout], found.sizes['p']
    info = source.tensors.get(key)
    if info and len(info.shape) == 3 and info.shape[2] == found.sizes['D']:
        grid = _grid_of(source.read(key)[0], hints, patch, POSITION_TOLERANCE.get(info.dtype, 0.0))
        source.release()
        if grid:
            return (grid[0] * patch, grid[1] * patch), []
        return None, [f'{key} {info.shape} is no sin-cos table of a square grid; give --input_size H,W']
    if side := hub.get('sample_size'):
        return (side, side), []
    if hints.input_size:
        return hints.input_size, []
    return None, [f'missing tensor: {key}; without it the image size must be told: --image_size N']


def _grid_of(table: np.ndarray, hints: Hints, patch: int, tolerance: float) -> tuple[int, int] | None:
    """The token grid whose sin-cos table this is; if none fits, the likeliest one."""
    tokens, width = table.shape
    side = math.isqrt(tokens)
    square = (side, side) if side * side == tokens else None
    told = tuple(length // patch for length in hints.input_size) if hints.input_size else None
    grids = [grid for grid in (square, told) if grid and grid[0] * grid[1] == tokens]
    grids += [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    if width % 4 == 0:
        for grid in grids:
            if np.abs(position_table(grid, width) - table).max() <= tolerance:
                return grid
    return square


def hub_problems(arch: Mapping, hub: Mapping, unknown: Iterable[str] = ()) -> list[str]:
    """Contradictions between a diffusers config.json and the tensors, and features that lit_jax lacks."""
    if not hub:
        return []
    values = {name: value for name, value in hub_sizes(arch).items() if _HUB_FIELDS.get(name) not in unknown}
    if 'heads' not in unknown:
        values['attention_head_dim'] = arch['width'] // arch['mixer']['heads']
    captions = caption_hub_problems(arch, hub) if arch['family'] == 'pixart' else []
    return captions + [f'config.json says {name} {shown(hub[name])}, the tensors say {value}'
                       for name, value in values.items() if hub.get(name) not in (None, value)]


# Field of a diffusers config.json -> ours that it shows.
_HUB_FIELDS = {'num_layers': 'depth', 'patch_size': 'patch', 'in_channels': 'channels',
               'num_embeds_ada_norm': 'num_classes', 'sample_size': 'input_size',
               'caption_channels': 'caption_channels', 'out_channels': 'learn_sigma'}


# Text models: name -> what it fixes.
_PIXART = {'family': 'pixart', 'depth': 28, 'width': 1152, 'mixer': 'softmax'}
TEXT_MODELS = {'pixart_xl': _PIXART, 'pixart_sigma_xl': _PIXART, 'lit_t2i': _PIXART | {'mixer': 'linear'}}


def parse_arch_name(name: str) -> dict:
    """'dit_xl', 'DiT-XL/2', 'lit_xl_512', 'moh_dit_xl_75', 'lit_t2i_1024' -> the fields that it fixes."""
    plain = re.sub(r'[-/]', '_', name.lower())
    known = {f'{key}_{size}': model for key, entry in SYSTEMS.items() for size, model in entry.sizes.items()}
    fitting = [start for start in (*known, *TEXT_MODELS) if re.fullmatch(rf'{start}(_\d+)*', plain)]
    if not fitting:
        raise UserError(f'unknown architecture {shown(name)}; expected a system and a size (s, b, l, xl), '
                        f'such as dit_xl. Systems: {", ".join(SYSTEMS)}. Text models: '
                        f'{", ".join(TEXT_MODELS)}')
    start = max(fitting, key=len)
    if start in TEXT_MODELS:
        expected = dict(TEXT_MODELS[start])
    else:
        model = known[start]
        expected = {name: model[name] for name in ('family', 'depth', 'width')}
        expected['mixer'] = model['mixer']['name']
        if model.get('stages'):
            expected['stages'] = plain_arch({'stages': model['stages']})['stages']
    for number in filter(None, plain[len(start):].split('_')):
        expected['patch' if int(number) < 64 else 'image_size'] = int(number)
    return expected


def check_expected(arch: Mapping, expected: Mapping, name: str, downscale: int = 1,
                   unknown: Iterable[str] = ()) -> None:
    """Refuses a model that is not the one asked for.

    arch: of the model in `name`. expected: any of depth, width, patch, image_size, input_size, channels,
    num_classes, mixer (its name), heads and other options of the mixer. downscale: image pixels per latent
    pixel, each way. unknown: fields of `arch` to skip."""
    expected = {key: value for key, value in expected.items() if value is not None}
    if 'image_size' in expected:
        image = expected.pop('image_size')
        sides = (image, image) if isinstance(image, int) else image
        if any(side % downscale for side in sides):
            raise UserError(f'image size {image} is not divisible by {downscale}, the latent\'s downscale')
        expected['input_size'] = [side // downscale for side in sides]
    have = {**arch, **arch['mixer'], 'mixer': arch['mixer']['name'], 'input_size': [*arch['input_size']]}
    if 'input_size' in expected:
        expected['input_size'] = [*expected['input_size']]
    wrong = [key for key, value in expected.items() if key not in unknown and have.get(key) != value]
    if not wrong:
        return
    lines = []
    if {'depth', 'width'} & {*wrong}:
        lines.append(f'{size_name(have)} there, {size_name({**have, **expected})} asked for')
    for key in wrong:
        if key == 'input_size':
            there, here = (_pixels(fields[key], downscale) for fields in (have, expected))
            lines.append(f'trained for {there}, asked for {here}')
        elif key == 'stages':
            lines.append('its layers have other mixers than those asked for (heads, or compressed keys)')
        elif key not in ('depth', 'width'):
            lines.append(f'{key}: {shown_name(have.get(key))} there, {shown_name(expected[key])} asked for')
    raise UserError(f'{name} holds another model than the one asked for:\n  ' + '\n  '.join(lines) +
                    '\nGive the checkpoint that fits, or ask for what this one holds.')


def size_name(arch: Mapping) -> str:
    """'XL (depth 28, width 1152)', without the letter for unpublished sizes."""
    letter = {(row['depth'], row['width']): name.upper() for name, row in SIZES.items()}
    sides = f'depth {arch["depth"]}, width {arch["width"]}'
    known = letter.get((arch['depth'], arch['width']))
    return f'{known} weights ({sides})' if known else f'weights of {sides}'


def _pixels(sides: Iterable[int], downscale: int) -> str:
    sides = list(sides)
    text = 'x'.join(str(side * downscale) for side in sides) + ' pixels'
    return text if downscale == 1 else f'{text} (latent {"x".join(map(str, sides))})'
