"""Which architecture a checkpoint holds, read off the names and shapes of its tensors.

Every tensor votes for the sizes that its shape shows, so one misshaped tensor is found out instead of misleading all
the rest. What shapes cannot show (heads of softmax attention, activation) comes from metadata, DiT's table of sizes, or
the caller.
"""
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lit_jax.checkpoint.torch_files import Source
from lit_jax.checkpoint.torch_keys import ATTENTION, BLOCK_PREFIX, EMBEDDERS, FOREIGN, POSITION_KEYS, REST, Rule
from lit_jax.config import SIZES
from lit_jax.errors import UserError
from lit_jax.models.arch import check_arch
from lit_jax.models.layers import position_table

# How far a stored position table may be from ours: other libraries' sines, and the rounding of values up to 1.
POSITION_TOLERANCE = {'float32': 1e-4, 'float16': 4e-4, 'bfloat16': 4e-3}
_BLOCK = re.compile(r'^((?:transformer_)?blocks\.)(0|[1-9]\d*)\.')


@dataclass(frozen=True)
class Hints:
    """What the caller knows and shapes do not show; None where he does not know either."""
    heads: int | None = None
    input_size: tuple[int, int] | None = None
    activation: str | None = None
    focus_power: int | None = None


@dataclass
class Found:
    """Everything that names and shapes say."""
    layout: str
    layers: dict[str, list[int]] = field(default_factory=dict)      # key pattern -> blocks that have it
    sizes: dict[str, int] = field(default_factory=dict)             # letter -> size with most votes
    depth: int = 0

    def has(self, rule: Rule) -> bool:
        return any(pattern in self.layers for pattern in rule.keys(self.layout))


@dataclass(frozen=True)
class Inferred:
    """An architecture read off a file; `unknown` fields hold placeholders, and then `problems` (or tensors) say why."""
    arch: dict
    unknown: set[str]
    problems: list[str]


def split_key(key: str) -> tuple[str, int | None]:
    """'blocks.3.attn.q.weight' -> ('blocks.{i}.attn.q.weight', 3); a key outside the blocks stays itself."""
    match = _BLOCK.match(key)
    return (f'{match[1]}{{i}}.{key[match.end():]}', int(match[2])) if match else (key, None)


def find_layout(keys: Iterable[str], name: str) -> str:
    """'original' or 'diffusers', or a UserError that says what else the file seems to be."""
    keys = list(keys)
    for marker, what in FOREIGN.items():
        if found := next((key for key in keys if marker in key), None):
            raise UserError(f'{name} looks like {what} (it has {found}); this converter reads DiT and LiT')
    if any(key.startswith(BLOCK_PREFIX['diffusers']) for key in keys):
        return 'diffusers'
    if any(key.startswith((BLOCK_PREFIX['original'], 'x_embedder.')) for key in keys):
        return 'original'
    raise UserError(f'{name} is no DiT or LiT checkpoint: expected tensors such as blocks.0.attn.qkv.weight, found '
                    f'{", ".join(keys[:5]) or "none"}')


def survey(source: Source, name: str) -> Found:
    """Sorts the tensors by pattern and lets them vote on the sizes."""
    found = Found(find_layout(source.tensors, name))
    votes: dict[str, Counter] = defaultdict(Counter)
    rules = {pattern: rule for rule in (*EMBEDDERS, *(r for mixer in ATTENTION.values() for r in mixer), *REST)
             for pattern in rule.keys(found.layout)}
    for key, info in source.tensors.items():
        pattern, layer = split_key(key)
        if pattern not in rules:
            continue
        found.layers.setdefault(pattern, []).append(0 if layer is None else layer)
        found.depth = max(found.depth, 0 if layer is None else layer + 1)
        letters = _torch_letters(rules[pattern], found.layout)
        if len(letters) == len(info.shape):
            for letter, size in zip(letters, info.shape, strict=True):
                if isinstance(letter, str):
                    votes[letter][size] += 1
    found.sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    if found.depth > len(source.tensors):
        raise UserError(f'{name} numbers its blocks up to {found.depth - 1}, but has only {len(source.tensors)} '
                        'tensors; the file is damaged')
    return found


def _torch_letters(rule: Rule, layout: str) -> tuple:
    """The rule's shape in torch's order; None for an axis that is fused from several."""
    shape, fused = rule.shape, len(rule.keys(layout)) > 1
    if rule.transform == 'linear':
        return (shape[1] if len(shape) == 2 else None, shape[0])
    if rule.transform == 'linear_in':
        return (shape[-1], None)
    if rule.transform == 'conv':
        return (shape[3], shape[2], shape[0], shape[1])
    return shape if len(shape) == 1 or rule.transform == 'copy' else ('D' if fused else None,)


def infer_arch(source: Source, name: str, hints: Hints) -> Inferred:
    """The architecture of the model in `source`, as far as its tensors and the hints tell.

    Raises:
        UserError: not a DiT or LiT at all. Everything else that is wrong is in the result's `problems`, to be told
            together with what is wrong with single tensors.
    """
    found, hub = survey(source, name), source.hub_config or {}
    sizes, unknown = found.sizes, set()
    if not sizes.get('D'):
        raise UserError(f'{name} is no DiT or LiT checkpoint: none of its tensors shows the width of the model; '
                        'expected tensors such as x_embedder.proj.bias and blocks.0.mlp.fc2.bias')
    # A size that no tensor shows: all tensors that would are missing, and the reading will name them. Any value serves.
    for letter, field_name, placeholder in (('p', 'patch', 2), ('C', 'channels', 4), ('R', 'num_classes', 2),
                                            ('F', 'mlp_ratio', 4 * sizes['D']), ('O', 'learn_sigma', None)):
        if not sizes.get(letter):
            unknown.add(field_name)
            sizes[letter] = placeholder or 2 * sizes['p'] ** 2 * sizes['C']
    if not found.depth:
        unknown.add('depth')
    token = sizes['p'] ** 2 * sizes['C']
    problems = []
    if sizes['O'] not in (token, 2 * token) and not {'patch', 'channels'} & unknown:
        problems.append(f'the final layer gives {sizes["O"]} numbers a token, expected {token} (patch² · channels) or '
                        'twice that')
    mixer, mixer_problems = _mixer(found, hints, hub)
    input_size, size_problems = _input_size(source, found, hints, hub)
    if mixer['heads'] is None or mixer_problems:
        unknown.add('heads')
        mixer['heads'] = max(1, sizes['D'] // sizes['E']) if 'E' in sizes else 1
    if input_size is None:
        unknown.add('input_size')
    arch = {'family': 'dit', 'depth': found.depth or 1, 'width': sizes['D'], 'patch': sizes['p'],
            'input_size': input_size or (sizes['p'], sizes['p']), 'channels': sizes['C'], 'num_classes': sizes['R'] - 1,
            'mlp_ratio': sizes['F'] / sizes['D'], 'learn_sigma': sizes['O'] != token, 'mixer': mixer}
    problems += mixer_problems + size_problems + _hub_problems(arch, hub, unknown)
    return Inferred(plain_arch(arch if unknown or problems else check_arch(arch)), unknown, problems)


def plain_arch(arch: Mapping) -> dict:
    """A copy of `arch` in the form in which it is stored: lists, not tuples."""
    return {**arch, 'mixer': dict(arch['mixer']), 'input_size': [int(side) for side in arch['input_size']]}


def _mixer(found: Found, hints: Hints, hub: Mapping) -> tuple[dict, list[str]]:
    """The mixer's description and what is missing for it."""
    counts = {name: sum(len(found.layers.get(pattern, ())) for rule in rules if '/proj/' not in rule.path
                        for pattern in rule.keys(found.layout)) for name, rules in ATTENTION.items()}
    name = max(counts, key=counts.get)
    bias = any(found.has(rule) for rule in ATTENTION[name] if rule.needs == 'qkv_bias')
    width, told = found.sizes['D'], hints.heads
    if name == 'softmax':
        known = {(row['depth'], row['width']): row['softmax_heads'] for row in SIZES.values()}
        heads = told or hub.get('num_attention_heads') or known.get((found.depth, width))
        problems = _check_heads(heads, width)
        if told and hub.get('num_attention_heads', told) != told:
            problems = [f'config.json says {hub["num_attention_heads"]} heads, {told} were asked for']
        if hints.activation or hints.focus_power:
            problems.append('softmax attention has neither activation nor focus_power')
        return {'name': name, 'heads': heads, 'qkv_bias': bias}, problems
    head_dim, kernel = found.sizes.get('E'), found.sizes.get('k', 0)
    heads = told or (width // head_dim if head_dim and width % head_dim == 0 else None)
    problems = _check_heads(heads, width)
    if not problems and head_dim and width // heads != head_dim:
        problems = [f'the depth-wise convolution has {head_dim} channels, so the model has {width / head_dim:g} heads, '
                    f'not {heads}']
    return {'name': name, 'heads': heads, 'qkv_bias': bias, 'dwc_kernel': kernel,
            'activation': hints.activation or 'relu', 'focus_power': hints.focus_power or 0}, problems


def _check_heads(heads: int | None, width: int) -> list[str]:
    if heads is None:
        return [f'the number of heads cannot be seen in the file, and width {width} with this depth is none of DiT\'s '
                'sizes; give --heads N']
    if heads < 1 or width % heads:
        return [f'{heads} heads do not divide the width {width}; give --heads N with an N that does']
    return []


def _input_size(source: Source, found: Found, hints: Hints, hub: Mapping) -> tuple[tuple[int, int] | None, list[str]]:
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
    """The token grid whose sin-cos table this is; where none fits (the import will say so), the likeliest one."""
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


def _hub_problems(arch: Mapping, hub: Mapping, unknown: set[str]) -> list[str]:
    """Where config.json of a diffusers folder contradicts the tensors beside it."""
    seen = {'num_layers': 'depth', 'patch_size': 'patch', 'in_channels': 'channels',
            'num_embeds_ada_norm': 'num_classes'}
    values = {theirs: arch[ours] for theirs, ours in seen.items() if ours not in unknown}
    if 'heads' not in unknown:
        values['attention_head_dim'] = arch['width'] // arch['mixer']['heads']
    if 'input_size' not in unknown:
        values['sample_size'] = arch['input_size'][0]
    return [f'config.json says {name} {hub[name]}, the tensors say {value}' for name, value in values.items()
            if hub.get(name) not in (None, value)]


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for


def parse_arch_name(name: str) -> dict:
    """'dit_xl', 'lit_s_4', 'DiT-XL/2', 'lit_xl_512' -> the fields that the name fixes."""
    match = re.fullmatch(r'(dit|lit)_(s|b|l|xl)((?:_\d+)*)', re.sub(r'[-/]', '_', name.lower()))
    if not match:
        raise UserError(f'unknown architecture {name!r}; expected dit_ or lit_ with s, b, l or xl, such as dit_xl')
    row = SIZES[match[2]]
    expected = {'depth': row['depth'], 'width': row['width'], 'mixer': 'softmax' if match[1] == 'dit' else 'linear'}
    for number in filter(None, match[3].split('_')):
        expected['patch' if int(number) < 64 else 'image_size'] = int(number)
    return expected


def check_expected(arch: Mapping, expected: Mapping, name: str, downscale: int = 1,
                   unknown: Iterable[str] = ()) -> None:
    """Refuses a model that is not the one asked for.

    Args:
        arch: what `name` holds. expected: any of depth, width, patch, image_size, input_size, channels, num_classes,
            mixer (its name), heads and other options of the mixer.
        downscale: image pixels a latent pixel, each way. unknown: fields of `arch` that are not to be compared.
    """
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
        elif key not in ('depth', 'width'):
            lines.append(f'{key}: {have.get(key)} there, {expected[key]} asked for')
    raise UserError(f'{name} holds another model than the one asked for:\n  ' + '\n  '.join(lines) +
                    '\nGive the checkpoint that fits, or ask for what this one holds.')


def size_name(arch: Mapping) -> str:
    """'XL (depth 28, width 1152)', without the letter for sizes of one's own."""
    letter = {(row['depth'], row['width']): name.upper() for name, row in SIZES.items()}
    sides = f'depth {arch["depth"]}, width {arch["width"]}'
    known = letter.get((arch['depth'], arch['width']))
    return f'{known} weights ({sides})' if known else f'weights of {sides}'


def _pixels(sides: Iterable[int], downscale: int) -> str:
    sides = list(sides)
    text = 'x'.join(str(side * downscale) for side in sides) + ' pixels'
    return text if downscale == 1 else f'{text} (latent {"x".join(map(str, sides))})'
