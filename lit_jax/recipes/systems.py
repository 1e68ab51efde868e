"""The systems that can be trained and compared, with their sizes: `system(config, 'dydi_lit', 's')` sets a
recipe's model.

One table, SYSTEMS. A size is a whole `config.model`. Sizes s, b, l, xl are those of the system's own paper;
the DyDi-LiT paper (arXiv 2601.13683) compares systems at other sizes, matched to 12 blocks of DiT of width
384, 512 and 768: for DiT and DiG these are called dydi_s, dydi_b, dydi_l, for systems without others s, b, l.
Their costs: `python -m lit_jax.recipes.system_costs`, docs/train/systems.md."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ml_collections import ConfigDict

from lit_jax.models.cost import Convention
from lit_jax.models.mixers import find_mixer
from lit_jax.recipes.recipe import SIZES, linear_mixer, softmax_mixer
from lit_jax.runtime.errors import UserError, check_known, shown

DYDI_WIDTHS = {'s': 384, 'b': 512, 'l': 768}
WIDE = 1024      # from this width on, recipes shard the weights over `fsdp`


@dataclass(frozen=True)
class System:
    """A system and its sizes.

    Attributes:
        title, paper: for people. sizes: {name: fields of config.model}; source: where they come from.
        published: {(size, image size): "Gflops" of a paper, in fact multiply-accumulates}; convention: its
            count."""
    title: str
    paper: str
    sizes: Mapping[str, Mapping]
    source: str
    published: Mapping[tuple[str, int], float] = field(default_factory=dict)
    convention: Convention = Convention()


def system(config: ConfigDict, name: str, size: str) -> ConfigDict:
    """Sets config.model to a size of SYSTEMS, large ones sharded over `fsdp`. UserError if unknown."""
    check_known('system', name, SYSTEMS)
    sizes = SYSTEMS[name].sizes
    if size not in sizes:
        raise UserError(f'{name} has no size {shown(size)}; its sizes: {", ".join(sizes)}')
    config.model = ConfigDict(sizes[size])
    if config.model.width >= WIDE:
        config.mesh.fsdp = -1
    return config


def sub_imagenet(config: ConfigDict, image_size: int = 256) -> ConfigDict:
    """The Sub-ImageNet setting of the DyDi-LiT paper (section 4.1): 100 classes, 100,600 steps of 256, 30,000
    samples. The list of classes is ours (lit_jax/data/subset.py); the paper's is not published."""
    config.data.update({'classes': 'sub_imagenet', 'num_classes': 100, 'image_size': image_size})
    config.train.steps = 100_600
    config.eval.update({'full_num_samples': 30_000, 'steps': 200, 'labels': 'balanced',
                        'cfg_scales': (1.0, 4.0), 'metrics': 'fid,sfid,kid,skid,is,precision,recall'})
    return config


def _dit(depth: int, width: int, mixer: Mapping, *, ffn: str = 'mlp', stages: Sequence[Mapping] = ()) -> dict:
    return {'family': 'dit', 'depth': depth, 'width': width, 'patch': 2, 'mlp_ratio': 4.0,
            'learn_sigma': True, 'ffn': ffn, 'mixer': dict(mixer), 'stages': tuple(stages)}


def _dit_sizes(mixer: str) -> dict:
    make = {'softmax': softmax_mixer, 'linear': linear_mixer}[mixer]
    return {key: _dit(row['depth'], row['width'], make(row[f'{mixer}_heads'])) for key, row in SIZES.items()}


def _compressed(width: int) -> dict:
    """DiT of 12 blocks, the last six with one key for 4 x 4 tokens."""
    stages = {'depth': 6}, {'depth': 6, 'mixer': {'compress': 4}}
    return _dit(12, width, softmax_mixer(width // 64), stages=stages)


# Of these two all options of the mixer, so that each can be set on the command line.
DYDILA = {'name': 'dydila', 'heads': 1, **find_mixer('dydila').defaults()}
GLA = {'name': 'gla', **find_mixer('gla').defaults()}
DYDI_CHOICES = {'s': (3, 9, 9), 'b': (5, 15, 15), 'l': (7, 21, 21)}


def _dydi_lit(size: str) -> dict:
    projectors, powers, factors = DYDI_CHOICES[size]
    mixer = DYDILA | {'projectors': projectors, 'powers': powers, 'factors': factors}
    return _dit(9, DYDI_WIDTHS[size], mixer, ffn='mix')


def _sana(width: int) -> dict:
    return _dit(9, width, {'name': 'sana', 'heads': 1, 'qkv_bias': False, 'eps': 1e-8}, ffn='mix')


# DiG, table 2: (depth, width, heads); the official code's XL has 18 heads, so that each has 64 channels.
DIG_SIZES = {'s': (12, 384, 6), 'b': (12, 768, 12), 'l': (24, 1024, 16), 'xl': (28, 1152, 18)}
# Table 2 of the same paper; heads of 32 channels are the widest that divide all widths.
UDIG_SIZES = {'s': (20, 128, 4), 'b': (20, 256, 8), 'l': (40, 320, 10), 'xl': (40, 416, 13)}
# Depths that reproduce the GFLOPs of the DyDi-LiT paper, with as many channels of keys as of values.
DYDI_DIG_DEPTHS = {'s': 15, 'b': 14, 'l': 15}


def _dig(depth: int, width: int, heads: int, expand_k: float = 0.5) -> dict:
    return {'family': 'dig', 'depth': depth, 'width': width, 'patch': 2, 'mlp_ratio': 4.0,
            'learn_sigma': True, 'ffn': 'swiglu', 'mixer': GLA | {'heads': heads, 'expand_k': expand_k},
            'order': 'official', 'local': 'identity', 'skip': 'none'}


def _udig(depth: int, width: int, heads: int) -> dict:
    model = _dig(depth, width, heads) | {'family': 'udig', 'patch': 1}
    del model['skip']
    return model


# Runs of equal layers, (layers, heads, shared, routed), of the official code (MoH-DiT/models.py); _75: 75 %
# of the heads are in use. L and XL have fewer heads in early layers and more in late ones.
MOH_RUNS = {
    's': ((8, 6, 3, 2), (4, 6, 6, 0)),
    's_75': ((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
    'b': ((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    'b_75': ((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)),
    'l': ((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    'l_75': ((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    'xl': ((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    'xl_75': ((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
}
MOH_HEAD_DIM = {'s': 64, 'b': 64, 'l': 64, 'xl': 72}


def _moh(name: str) -> dict:
    size, runs = SIZES[name.removesuffix('_75')], MOH_RUNS[name]
    _, heads, shared, routed = runs[0]
    mixer = {'name': 'moh', 'heads': heads, 'shared': shared, 'routed': routed,
             'head_dim': MOH_HEAD_DIM[name.removesuffix('_75')], 'qkv_bias': True}
    stages = [{'depth': layers, 'mixer': {'heads': heads, 'shared': shared, 'routed': routed}}
              for layers, heads, shared, routed in runs]
    return _dit(size['depth'], size['width'], mixer, stages=stages)


# DiG's printed figures lack the second product of its SwiGLU, which the official code fuses, and the
# recurrence, which is a kernel: a counter of modules sees neither.
_DIG_CONVENTION = Convention('none', ('*/mlp/down/kernel',), 'no second product of the SwiGLU, no recurrence')
_DYDI_SOURCE = 'sizes that reproduce the GFLOPs of the DyDi-LiT paper; it names widths only'

SYSTEMS: dict[str, System] = {
    'dit': System(
        'DiT', 'arXiv 2212.09748',
        _dit_sizes('softmax') | {f'dydi_{size}': _dit(12, width, softmax_mixer(width // 64))
                                 for size, width in DYDI_WIDTHS.items()},
        'DiT, table 1; dydi: 12 blocks (DyDi-LiT, section 4.1), heads of 64 channels',
        {('s', 256): 6.06, ('b', 256): 23.01, ('xl', 256): 119, ('xl', 512): 525,
         ('dydi_s', 256): 6.06, ('dydi_b', 256): 10.50, ('dydi_l', 256): 23.01, ('dydi_l', 512): 106.42}),
    'lit': System('LiT', 'arXiv 2501.12976', _dit_sizes('linear'), 'LiT, supplement table 1'),
    'dig': System(
        'DiG', 'arXiv 2405.18428',
        {size: _dig(*row) for size, row in DIG_SIZES.items()}
        | {f'dydi_{size}': _dig(depth, DYDI_WIDTHS[size], DYDI_WIDTHS[size] // 64, 1.0)
           for size, depth in DYDI_DIG_DEPTHS.items()},
        'DiG, table 2, and official code; dydi: depth and keys from the GFLOPs of the DyDi-LiT paper',
        {('s', 256): 4.30, ('b', 256): 17.07, ('l', 256): 61.66, ('xl', 256): 89.40,
         ('dydi_s', 256): 5.92, ('dydi_b', 256): 10.43, ('dydi_l', 256): 23.58, ('dydi_l', 512): 94.15},
        _DIG_CONVENTION),
    'udig': System(
        'U-DiG', 'arXiv 2405.18428', {size: _udig(*row) for size, row in UDIG_SIZES.items()},
        'DiG, table 2; the rest is chosen (lit_jax/models/udig.py)',
        {('s', 256): 4.10, ('b', 256): 15.20, ('l', 256): 53.57, ('xl', 256): 79.09}, _DIG_CONVENTION),
    'dydi_lit': System(
        'DyDi-LiT', 'arXiv 2601.13683', {size: _dydi_lit(size) for size in DYDI_WIDTHS},
        'DyDi-LiT, section 4.1; heads and the width of the FFN from its GFLOPs',
        {('s', 256): 5.98, ('b', 256): 10.39, ('l', 256): 22.85, ('l', 512): 98.55},
        Convention('cheaper', ('*/attn/routed_[qk]/*', '*/attn/power_*', '*/attn/difference_*'),
                   'no routers, no routed products; the cheaper order of the attention products')),
    'sana': System(
        'Sana, class-conditional', 'arXiv 2410.10629',
        {size: _sana(width) for size, width in DYDI_WIDTHS.items()},
        _DYDI_SOURCE, {('s', 256): 5.97, ('b', 256): 10.38, ('l', 256): 22.83, ('l', 512): 98.46},
        Convention('cheaper', why='the cheaper order of the attention products')),
    'edit': System(
        'EDiT', 'arXiv 2503.16726',
        {size: _dit(9, width, {'name': 'edit', 'heads': 1}) for size, width in DYDI_WIDTHS.items()},
        _DYDI_SOURCE, {('s', 256): 5.91, ('b', 256): 10.45, ('l', 256): 23.39, ('l', 512): 96.17},
        Convention('cheaper', why='the cheaper order of the attention products')),
    'moh_dit': System('MoH-DiT', 'arXiv 2410.11842', {name: _moh(name) for name in MOH_RUNS},
                      'official code; without a suffix 90 % of the heads are in use, _75: 75 %'),
    'dit_kv': System(
        'DiT with compressed keys (PixArt-Σ)', 'arXiv 2403.04692',
        {size: _compressed(w) for size, w in DYDI_WIDTHS.items()},
        _DYDI_SOURCE, {('s', 256): 5.78, ('b', 256): 10.13, ('l', 256): 22.45, ('l', 512): 97.38}),
}
