"""Architectures, checked before they are built: fields, sharding, the layer that owns a parameter."""
import re
from collections.abc import Mapping
from typing import Any

from lit_jax.models.dig import DiG, check_dig
from lit_jax.models.dit import DiT, stage_mixers
from lit_jax.models.facts import Leaf
from lit_jax.models.ffn import FFNS
from lit_jax.models.layers import NORMS
from lit_jax.models.mixers import MIXERS, check_mixer, find_mixer
from lit_jax.models.pixart import PixArt, check_pixart
from lit_jax.models.projectors import check_projectors
from lit_jax.models.udig import UDiG, check_udig
from lit_jax.runtime.errors import UserError, check_known, shown, shown_name
from lit_jax.runtime.ranges import FINITE, Range, check_ranges

FAMILIES = {'dit': DiT, 'dig': DiG, 'udig': UDiG, 'pixart': PixArt}
# Fields of every family; what each family requires beside them; defaults.
REQUIRED = {'family', 'depth', 'width', 'patch', 'input_size', 'channels', 'mixer'}
CONDITION_FIELDS = {'label': {'num_classes'}, 'text': {'cross_heads', 'caption_channels', 'caption_tokens'}}
# May be given: null_class False says that the null class was never trained, so that nothing is guided by it.
OPTIONAL = {'label': {'null_class'}, 'text': set()}
# LightningDiT's norm with a gain, and blocks that are scaled, not shifted; REPA's projectors.
OF_DIT = {'norm', 'shift', 'projectors'}
DEFAULTS: dict[str, Any] = {'mlp_ratio': 4.0, 'learn_sigma': True}
FAMILY_DEFAULTS: dict[str, dict] = {'dit': {'ffn': 'mlp', 'stages': ()},
                   'dig': {'ffn': 'swiglu', 'order': 'official', 'local': 'identity', 'skip': 'none'},
                   'udig': {'ffn': 'swiglu', 'order': 'official', 'local': 'identity'},
                   'pixart': {'ffn': 'mlp', 'stages': (), 'base_size': 32, 'pe_interpolation': 1.0}}
_SIZE, _FACTOR = Range(1, 65_536), Range(0, 1024, whole=False, above=True)
_RATIO = Range(0.01, 1024, whole=False)      # of a width that leaves a channel
_MIXER_RANGES = {
    'heads': _SIZE, 'head_dim': Range(1, 65_536, also=(None,)), 'dwc_kernel': Range(0, 127),
    'focus_power': Range(0, 64), 'compress': _SIZE, 'shared': Range(0, 65_536), 'routed': Range(0, 65_536),
    'expand_k': _FACTOR, 'chunk': Range(0, 65_536), 'projectors': Range(0, 65_536),
    'powers': Range(0, 65_536), 'factors': Range(0, 65_536), 'factor_init': FINITE,
    'eps': Range(0, 1, whole=False, above=True), 'ratio': _FACTOR, 'groups': _SIZE}
# Of every number of an architecture; of the mixers only our own are known.
RANGES = {
    'depth': Range(1, 4096), 'width': _SIZE, 'patch': Range(1, 1024), 'channels': _SIZE,
    'input_size[]': _SIZE, 'num_classes': Range(1, 2 ** 24), 'mlp_ratio': _RATIO, 'cross_heads': _SIZE,
    'caption_channels': _SIZE, 'caption_tokens': _SIZE, 'base_size': _SIZE, 'pe_interpolation': _FACTOR,
    'stages[].depth': Range(1, 4096),
    **{f'{place}.{name}': own for name, own in _MIXER_RANGES.items()
       for place in ('mixer', 'stages[].mixer')}}
FAMILY_CHECKS = {'dig': check_dig, 'udig': check_udig, 'pixart': check_pixart}


def conditioning(arch: Mapping) -> str:
    """'label' (a class; also of an unknown family) or 'text' (a caption): the condition of a model."""
    return getattr(FAMILIES.get(arch['family']), 'conditioning', 'label')


def check_arch(arch: Mapping) -> dict:
    """A plain, complete copy of `arch`, or a UserError that names the first wrong field."""
    arch = _plain(arch)
    if not isinstance(arch, dict):
        raise UserError(f'an architecture is a table of fields, got {shown(arch)}')
    check_known('model family', arch.get('family'), FAMILIES)
    defaults = DEFAULTS | FAMILY_DEFAULTS[arch['family']]
    required = REQUIRED | CONDITION_FIELDS[conditioning(arch)]
    known = required | set(defaults) | OPTIONAL[conditioning(arch)]
    known |= OF_DIT if arch['family'] == 'dit' else set()
    if missing := required - set(arch):
        raise UserError(f'the architecture lacks {", ".join(sorted(missing))}')
    if unknown := set(arch) - known:
        raise UserError(f'the architecture has unknown fields {", ".join(sorted(map(shown_name, unknown)))}; '
                        f'a model of family {shown(arch["family"])} knows: {", ".join(sorted(known))}')
    _check_values(arch)
    if any(side % arch['patch'] for side in arch['input_size']):
        raise UserError(f'input size {tuple(arch["input_size"])} is not divisible by patch {arch["patch"]}')
    if arch['width'] % 4:
        raise UserError(f'model.width {arch["width"]} is not a multiple of 4, which the position table needs')
    arch = {**defaults, **arch}
    check_known('model.ffn', arch['ffn'], FFNS)
    for mixer in mixers_of(arch):
        _check_kinds(mixer, check_mixer(mixer, arch['width']))
    if check := FAMILY_CHECKS.get(arch['family']):
        check(arch)
    return arch


def _check_values(arch: Mapping) -> None:
    if not isinstance(arch['mixer'], Mapping):
        raise UserError(f'model.mixer must be a mixer with its options, got {shown(arch["mixer"])}')
    if not isinstance(arch['input_size'], tuple) or len(arch['input_size']) != 2:
        raise UserError(f'input_size must be the two sides of a latent, got {shown(arch["input_size"])}')
    if not arch.get('stages', ()) and arch.get('stages', ()) != ():      # others: `stage_mixers`
        raise UserError(f'model.stages must be a list of runs of blocks, got {shown(arch["stages"])}')
    check_known('model.norm', arch.get('norm', 'layer'), NORMS)
    check_projectors(arch.get('projectors'), arch['depth'])
    for name in ('learn_sigma', 'null_class', 'shift'):
        if not isinstance(arch.get(name, True), bool):
            raise UserError(f'model.{name} must be true or false, got {shown(arch[name])}')
    ours = all(mixer.get('name') in tuple(MIXERS) for mixer in mixers_of(arch))
    check_ranges(arch, {f'model.{name}': own for name, own in RANGES.items() if ours or 'mixer.' not in name},
                 'model')


def _check_kinds(mixer: Mapping, kind) -> None:
    """Options that are switches or words; `RANGES` has the numbers."""
    for name, default in kind.defaults().items():
        if isinstance(default, bool | str) and not isinstance(mixer.get(name, default), type(default)):
            raise UserError(f'model.mixer.{name} must be like {shown(default)}, got {shown(mixer[name])}')


def mixers_of(arch: Mapping) -> list[dict]:
    """The mixer of every run of equal blocks, in order."""
    return [mixer for _, mixer in stage_mixers(arch['depth'], arch['mixer'], arch.get('stages', ()))]


def mixing_layers(arch: Mapping) -> list[tuple[int, dict, int, tuple[int, int]]]:
    """[(layers, mixer, width, (rows, columns) of tokens)] of every run of equal blocks. Families whose runs
    differ in width or grid have a static method of this name."""
    own = getattr(FAMILIES[arch['family']], 'mixing_layers', None)
    if own is not None:
        return own(arch)
    grid = tuple(side // arch['patch'] for side in arch['input_size'])
    return [(layers, mixer, arch['width'], grid)
            for layers, mixer in stage_mixers(arch['depth'], arch['mixer'], arch.get('stages', ()))]


def shown_by(arch: Mapping, kind: str) -> tuple[str, ...]:
    """All names in the attribute `kind` ('losses', 'statistics' or 'routes') of an architecture's mixers."""
    names = (name for mixer in mixers_of(arch) for name in getattr(find_mixer(mixer['name']), kind))
    return tuple(dict.fromkeys(names))


_BLOCK_PART = re.compile(r'(?:^|/)blocks(\d*)/(attn|mlp)/(.+)$')


def find_owner(arch: Mapping, path: str) -> tuple[str, Any, str] | None:
    """(name, class, rest of the path) of the mixer or ffn that a parameter belongs to; None for other
    parameters. `path` may have any prefix: a moment's path ends with that of its parameter."""
    match = _BLOCK_PART.search(path)
    if not match:
        return None
    if match[2] == 'mlp':
        return arch['ffn'], FFNS[arch['ffn']], match[3]
    mixers = mixers_of(arch)      # one a run of blocks, or one for all groups of a U-DiG
    name = mixers[int(match[1] or 0) % len(mixers)]['name']
    return name, find_mixer(name), match[3]


def find_leaf(arch: Mapping, path: str) -> Leaf | None:
    """The `Leaf` that describes a parameter of a mixer or ffn; None where there is none."""
    if not (owner := find_owner(arch, path)):
        return None
    return next((leaf for leaf in owner[1].leaves if re.fullmatch(leaf.path, owner[2])), None)


def _plain(value):
    """Dicts and tuples all the way down: recipes bring ConfigDicts, JSON brings lists."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def count_tokens(arch: Mapping) -> int:
    """N of one image."""
    return arch['input_size'][0] * arch['input_size'][1] // arch['patch'] ** 2


def check_partition(arch: Mapping, sizes: Mapping[str, int], role: str = 'this model') -> None:
    """A UserError with everything that a mesh {'fsdp': ..., 'tensor': ..., 'seq': ...} cannot shard."""
    wants = list(dict.fromkeys(_wants(arch, sizes)))
    problems = [f'its {amount} {what} are not divisible by mesh.{axis} = {sizes[axis]}; mesh.{axis} can be '
                f'{_divisors(amount)}' for axis, what, amount in wants if amount % sizes[axis]]
    if problems:
        raise UserError(f'{role} does not fit on the mesh {dict(sizes)}:\n  ' + '\n  '.join(problems))


def _wants(arch: Mapping, sizes: Mapping[str, int]):
    """Yields (mesh axis, what it shards, how many of them there are)."""
    ffn = FFNS[arch['ffn']]
    rows = arch['input_size'][0] // arch['patch']
    for mixer in mixers_of(arch):
        if 'heads' in mixer:
            yield 'tensor', f'{mixer["name"]} heads', mixer['heads']
        yield 'seq', *_rows_of(mixer, rows)
    if 'cross_heads' in arch:
        yield 'tensor', 'heads of the cross-attention', arch['cross_heads']
    yield 'tensor', 'channels of the mlp', ffn.hidden_width(arch['width'], arch['mlp_ratio'])
    yield 'tensor', 'channels', arch['width']
    yield 'fsdp', 'channels', arch['width']


def _rows_of(mixer: Mapping, rows: int) -> tuple[str, int]:
    """What `seq` shards: rows of tokens, in whole `row_unit`s of the mixer. None: they cannot be sharded."""
    unit = find_mixer(mixer['name']).row_unit(mixer)
    if unit is None:
        return f'stretch of tokens that {mixer["name"]} mixes as one', 1
    return ('rows of tokens', rows) if unit == 1 else (f'runs of {unit} rows of tokens', rows // unit)


def _divisors(n: int) -> str:
    return ', '.join(str(d) for d in range(1, min(n, 256) + 1) if n % d == 0)
