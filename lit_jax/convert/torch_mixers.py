"""The mixer, its runs of unlike layers, and the ffn of a model, read off a PyTorch file.

What shapes do not show (heads of softmax attention, activation, how many routed heads a token of MoH uses)
comes from the published sizes (`lit_jax.recipes.systems`), the metadata of a folder, or the caller.
"""
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_jax.convert.torch_files import Source
from lit_jax.convert.torch_keys import ATTENTION, FFNS
from lit_jax.convert.torch_survey import Found, Hints
from lit_jax.models.ffn import SwiGlu
from lit_jax.recipes.recipe import SIZES
from lit_jax.recipes.systems import GLA, SYSTEMS

ATTN = 'blocks.{i}.attn.'


@dataclass
class Blocks:
    """What stands in the blocks: fields of the architecture, and what is missing for them."""
    mixer: dict
    stages: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    family: dict = field(default_factory=lambda: {'family': 'dit'})     # its name and fields of its own


def infer_ffn(found: Found) -> tuple[str, float, list[str]]:
    """(name, ratio of its inner width, problems)."""
    name = max(FFNS, key=lambda name: found.count(FFNS[name]))
    width, hidden = found.sizes['D'], found.sizes['F']
    if name != 'swiglu':
        return name, hidden / width, []
    # Two thirds of ratio · D, rounded up: several ratios give the same width. DiG's is 4.
    for ratio in (4.0, 1.5 * hidden / width):
        if SwiGlu.hidden_width(width, ratio) == hidden:
            return name, ratio, []
    return name, 4.0, [f'the mlp has {hidden} inner channels, which no ratio of SwiGLU gives: multiples of '
                       f'256 are expected']


def infer_blocks(source: Source, found: Found, hints: Hints, hub: Mapping) -> Blocks:
    """The mixer of every block."""
    own = {'softmax': ('qkv',), 'linear': ('q', 'kv', 'dwc'),
           'gla': ('q', 'key', 'value', 'gate', 'decay_in', 'decay_out')}
    name = max(own, key=lambda name: found.count(rule for rule in ATTENTION[name]
                                                 if rule.path.split('/')[2] in own[name]))
    if name == 'linear':
        return _linear(found, hints)
    if name == 'gla':
        return _dig(found, hints)
    if any(found.has(f'{ATTN}{router}.weight') for router in ('wg', 'wg_0', 'wg_1')):
        return _moh(source, found, hints)
    blocks = _softmax(found, hints, hub)
    # a Mix-FFN goes with linear attention; its file shows nothing else of it
    if infer_ffn(found)[0] == 'mix':
        blocks.mixer = {'name': 'sana', 'heads': blocks.mixer['heads'], 'qkv_bias': blocks.mixer['qkv_bias']}
        return blocks
    rates = [_side(source, f'{ATTN}sr.weight', layer, 2) or 1 for layer in range(found.depth)]
    if any(rate > 1 for rate in rates):
        runs = _runs(rates)
        if len(runs) == 1:
            blocks.mixer['compress'] = rates[0]
        else:
            blocks.stages = [{'depth': depth} if rate == 1 else {'depth': depth, 'mixer': {'compress': rate}}
                             for depth, rate in runs]
    return blocks


def _side(source: Source, pattern: str, layer: int, axis: int) -> int:
    """One side of a block's tensor, 0 where there is none."""
    info = source.tensors.get(pattern.replace('{i}', str(layer)))
    return info.shape[axis] if info and len(info.shape) > axis else 0


def _runs(values: Sequence) -> list[tuple[int, object]]:
    """[1, 1, 2] -> [(2, 1), (1, 2)]."""
    return [(len(list(group)), value) for value, group in itertools.groupby(values)]


def _softmax(found: Found, hints: Hints, hub: Mapping) -> Blocks:
    width, told = found.sizes['D'], hints.heads
    known = {(row['depth'], row['width']): row['softmax_heads'] for row in SIZES.values()}
    heads = told or hub.get('num_attention_heads') or known.get((found.depth, width))
    problems = _check_heads(heads, width)
    if told and hub.get('num_attention_heads', told) != told:
        problems = [f'config.json says {hub["num_attention_heads"]} heads, {told} were asked for']
    if hints.activation or hints.focus_power:
        problems.append('softmax attention has neither activation nor focus_power')
    bias = any(found.has(key) for rule in ATTENTION['softmax'] if rule.path == 'blocks/attn/qkv/bias'
               for key in rule.keys(found.layout))
    return Blocks({'name': 'softmax', 'heads': heads, 'qkv_bias': bias}, problems=problems)


def _linear(found: Found, hints: Hints) -> Blocks:
    width, told = found.sizes['D'], hints.heads
    head_dim, kernel = found.sizes.get('E'), found.sizes.get('k', 0)
    heads = told or (width // head_dim if head_dim and width % head_dim == 0 else None)
    problems = _check_heads(heads, width)
    if not problems and head_dim and width // heads != head_dim:
        problems = [f'the depth-wise convolution has {head_dim} channels, so the model has '
                    f'{width / head_dim:g} heads, not {heads}']
    bias = found.has(f'{ATTN}q.bias') or found.has(f'{ATTN}kv.bias')
    return Blocks({'name': 'linear', 'heads': heads, 'qkv_bias': bias, 'dwc_kernel': kernel,
                   'activation': hints.activation or 'relu', 'focus_power': hints.focus_power or 0},
                  problems=problems)


def _dig(found: Found, hints: Hints) -> Blocks:
    """The norm of the heads shows the channels of one, q_proj those of all keys."""
    width, values, keys = (found.sizes.get(letter, 0) for letter in 'DVQ')
    problems = []
    if not values or width % values:
        problems = [f'the norm of a head has {values} channels (attn.g_norm_swish_gate.weight), which do not '
                    f'divide the width {width}']
    heads = hints.heads or (1 if problems else width // values)
    if not problems and width // heads != values:
        problems = [f'a head has {values} channels, so the model has {width // values} heads, not {heads}']
    family = {'family': 'dig', 'skip': 'skip' if found.has('blocks.{i}.skip_linear.weight') else 'none',
              'local': 'identity' if found.has('blocks.{i}.dw_conv.weight') else 'none'}
    return Blocks(GLA | {'heads': heads, 'expand_k': keys / width if keys else GLA['expand_k']},
                  problems=problems, family=family)


def _check_heads(heads: int | None, width: int) -> list[str]:
    if heads is None:
        return [f'the number of heads cannot be seen in the file, and width {width} with this depth is none '
                f'of DiT\'s sizes; give --heads N']
    if heads < 1 or width % heads:
        return [f'{heads} heads do not divide the width {width}; give --heads N with an N that does']
    return []


# ------------------------------------------------------------------------------------------------------
# MoH


def _moh(source: Source, found: Found, hints: Hints) -> Blocks:
    """Routers show shared and routed heads of every layer, qkv their width; how many a token uses nothing
    shows."""
    problems, layers = [], []
    for layer in range(found.depth):
        experts = _side(source, f'{ATTN}wg.weight', layer, 0)
        # With one shared head there is nothing to weigh, only the router between the two kinds.
        shared = _side(source, f'{ATTN}wg_1.weight', layer, 0) or int(
            not experts or f'blocks.{layer}.attn.wg_0.weight' in source.tensors)
        heads, rows = experts + shared, _side(source, f'{ATTN}qkv.weight', layer, 0)
        if rows % (3 * heads):
            problems.append(f'blocks.{layer}.attn.qkv.weight has {rows} rows, which are not q, k and v of '
                            f'{heads} heads')
        layers.append({'heads': heads, 'shared': shared, 'head_dim': max(1, rows // (3 * heads))})
    if hints.heads:
        problems.append('MoH-DiT shows its heads; leave --heads out')
    if hints.activation or hints.focus_power:
        problems.append('softmax attention has neither activation nor focus_power')
    routed = _routed(layers, found, hints)
    if routed is None:
        problems.append('how many of the routed heads a token uses cannot be seen in the file, and this is '
                        'none of the '
                        f'published sizes of MoH-DiT; give --routed N, or --routed N,N,... with a number for '
                        f'each of the {found.depth} layers')
        routed = [1] * found.depth
    for layer, number in zip(layers, routed, strict=True):
        layer['routed'] = min(number, layer['heads'] - layer['shared'])
    bias = found.has(f'{ATTN}qkv.bias')
    return Blocks(*moh_stages(layers, bias), problems)


def moh_stages(layers: Sequence[Mapping], qkv_bias: bool) -> tuple[dict, list[dict]]:
    """(mixer, stages) of layers with their heads, shared, routed and head_dim; written as
    `lit_jax.recipes.systems` does."""
    runs = _runs([dict(sorted(layer.items())) for layer in layers])
    common = {'head_dim'} if len({layer['head_dim'] for layer in layers}) == 1 else set()
    first = runs[0][1]
    mixer = {'name': 'moh', **{name: first[name] for name in ('heads', 'shared', 'routed', 'head_dim')},
             'qkv_bias': qkv_bias}
    stages = [{'depth': depth, 'mixer': {name: run[name] for name in ('heads', 'shared', 'routed', 'head_dim')
                                         if name not in common}} for depth, run in runs]
    return mixer, stages if len(runs) > 1 else []


def _routed(layers: Sequence[Mapping], found: Found, hints: Hints) -> list[int] | None:
    """For each layer what the caller says, or what the published size with these heads has."""
    if hints.routed and len(hints.routed) in (1, found.depth):
        return list(hints.routed * found.depth if len(hints.routed) == 1 else hints.routed)
    heads = [(layer['heads'], layer['shared']) for layer in layers]
    for size in SYSTEMS['moh_dit'].sizes.values():
        own = [{**size['mixer'], **stage['mixer']} for stage in size['stages'] for _ in range(stage['depth'])]
        if size['width'] == found.sizes['D'] and [(mixer['heads'], mixer['shared'])
                                                  for mixer in own] == heads:
            return [mixer['routed'] for mixer in own]
    return None
