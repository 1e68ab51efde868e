"""Sizes and layout of a PyTorch file, from the names and shapes of its tensors.

Every tensor votes for the sizes that its shape shows: one misshaped tensor does not mislead the rest."""
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lit_jax.convert import torch_keys
from lit_jax.convert.torch_files import Source
from lit_jax.convert.torch_keys import published_leaves
from lit_jax.models.facts import Leaf
from lit_jax.models.ffn import FFNS
from lit_jax.models.mixers import MIXERS
from lit_jax.runtime.errors import UserError, shown_name

READABLE = 'DiT, LiT, SiT, REPA, LightningDiT, PixArt-Σ, DiG, MoH-DiT and our own exports'
_LABELS = *torch_keys.EMBEDDERS, *torch_keys.REST
_CAPTIONS = *torch_keys.PIXART_EMBEDDERS, *torch_keys.PIXART_REST
MIXER_LEAVES = {name: published_leaves('attn', kind) for name, kind in MIXERS.items()}
FFN_LEAVES = {name: published_leaves('mlp', kind) for name, kind in FFNS.items()}
_BLOCK = re.compile(r'^((?:transformer_)?blocks\.)(0|[1-9]\d*)\.')


@dataclass(frozen=True)
class Hints:
    """What the caller knows and shapes do not show; None if unknown. routed: of MoH, a number for all layers
    that route, or one per layer. cross_heads: of those for captions. num_classes: of the label table, which
    may have a row more."""
    heads: int | None = None
    cross_heads: int | None = None
    input_size: tuple[int, int] | None = None
    activation: str | None = None
    focus_power: int | None = None
    routed: tuple[int, ...] | None = None
    num_classes: int | None = None


@dataclass
class Found:
    """The result of `survey`."""
    layout: str
    source: Source
    layers: dict[str, list[int]] = field(default_factory=dict)      # key pattern -> blocks that have it
    sizes: dict[str, int] = field(default_factory=dict)             # letter -> size with most votes
    depth: int = 0

    @property
    def hub(self) -> Mapping:
        """config.json of a diffusers folder, else empty."""
        return self.source.hub_config or {}

    def has(self, pattern: str) -> bool:
        return pattern in self.layers

    @property
    def captions(self) -> bool:
        """Whether it is a text model: it has more tensors found only in those than only in label models."""
        labels = {key for rule in _LABELS for key in rule.keys(self.layout)}
        captions = {key for rule in _CAPTIONS for key in rule.keys(self.layout)}
        own, other = (sum(map(self.has, keys)) for keys in (captions - labels, labels - captions))
        return own > other

    def _patterns(self, leaf: str) -> list[str]:
        """The key patterns of a leaf of any mixer, by its path below `attn`."""
        path = f'blocks/attn/{leaf}'
        return [pattern for leaves in MIXER_LEAVES.values() for own in leaves if own.path == path
                for pattern in own.keys(self.layout)]

    def holds(self, leaf: str) -> bool:
        """Whether any block has the leaf: 'qkv/bias'."""
        return any(map(self.has, self._patterns(leaf)))

    def side(self, leaf: str, layer: int, axis: int) -> int:
        """One side of a block's tensor; 0 if there is none."""
        for pattern in self._patterns(leaf):
            info = self.source.tensors.get(pattern.replace('{i}', str(layer)))
            if info and len(info.shape) > axis:
                return info.shape[axis]
        return 0

    def count(self, leaves: Iterable[Leaf]) -> int:
        """Tensors that belong to these leaves."""
        return sum(len(self.layers.get(pattern, ())) for leaf in leaves for pattern in leaf.keys(self.layout))


def split_key(key: str) -> tuple[str, int | None]:
    """'blocks.3.attn.q.weight' -> ('blocks.{i}.attn.q.weight', 3); a key outside the blocks stays itself."""
    match = _BLOCK.match(key)
    return (f'{match[1]}{{i}}.{key[match.end():]}', int(match[2])) if match else (key, None)


def find_layout(keys: Iterable[str], name: str) -> str:
    """'original' or 'diffusers', or a UserError that says what else the file seems to be."""
    keys = list(keys)
    for marker, what in torch_keys.FOREIGN.items():
        if found := next((key for key in keys if marker in key), None):
            hint = _HINTS.get(marker, '')
            raise UserError(f'{name} looks like {what} (it has {shown_name(found)}); this converter reads '
                            f'{READABLE}{hint}')
    if any(key.startswith(torch_keys.BLOCK_PREFIX['diffusers']) for key in keys):
        return 'diffusers'
    if any(key.startswith((torch_keys.BLOCK_PREFIX['original'], 'x_embedder.')) for key in keys):
        return 'original'
    raise UserError(f'{name} is no checkpoint of {READABLE}: expected tensors such as '
                    f'blocks.0.attn.qkv.weight, found {", ".join(map(shown_name, keys[:5])) or "none"}')


# What to give in the place of single files of other networks.
_HINTS = {
    'encoder.block.': '; a T5 is read from its folder, with config.json and tokenizer: give that',
    'encoder.down': '; a VAE is read from its folder in the form of diffusers, with config.json: give that'}
_HINTS['down_blocks.'] = _HINTS['encoder.down']


def survey(source: Source, name: str) -> Found:
    """Sorts the tensors by pattern and lets them vote on the sizes."""
    found = Found(find_layout(source.tensors, name), source)
    votes: dict[str, Counter] = defaultdict(Counter)
    tables = (*MIXER_LEAVES.values(), *FFN_LEAVES.values(), *torch_keys.FAMILIES.values())
    known = (*_LABELS, *_CAPTIONS, *(rule for table in tables for rule in table))
    rules = {pattern: rule for rule in known for pattern in rule.keys(found.layout)}
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
        raise UserError(f'{name} numbers its blocks up to {found.depth - 1}, but has only '
                        f'{len(source.tensors)} tensors; the file is damaged')
    return found


def _torch_letters(rule: Leaf, layout: str) -> tuple:
    """The leaf's shape in torch's order; an axis fused from several has their letters joined, or None."""
    shape, fused = rule.shape, len(rule.keys(layout)) > 1
    letters = {
        'linear': lambda: (_joined(shape[1:]), shape[0]),
        'linear_in': lambda: (shape[-1], _joined(shape[:-1])),
        'conv': lambda: (shape[3], shape[2], shape[0], shape[1]),
        'depthwise': lambda: (_joined(shape[2:]), None, shape[0], shape[1]),
        'pointwise': lambda: (_joined(shape[1:]), shape[0], None, None),
        'copy': lambda: shape,
        'flat': lambda: ('D',) if fused else (_joined(shape),),
    }
    return letters[rule.transform]()


def _joined(sides: tuple):
    """The name of an axis fused from several sides: their letters, if each has one."""
    sides = [side for side in sides if side != 1]
    return ''.join(sides) if all(isinstance(side, str) for side in sides) else None
