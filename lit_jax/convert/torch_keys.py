"""The tables between PyTorch's tensors and our parameter tree: names, shapes, and a named transform with its
inverse.

One `Leaf` per parameter of a published PyTorch model: DiT, LiT (as DiT, with its attention named q, kv, proj,
dwc as in the paper's Algorithm 1), MoH-DiT, DiG, PixArt-Σ's compressed keys and Sana's Mix-FFN. Those of
mixers and ffns are in their own files; here are those of the families. A leaf without an entry (EDiT,
DyDi-LiT and U-DiG have no official code) keeps its own path and layout: `blocks/attn/fusion/norm/gain` of
block 3 is `blocks.3.attn.fusion.norm.gain`, outside the blocks the whole leaf. `{i}` in a key is the block,
counted through all runs of unlike blocks (`blocks0/`, `blocks1/`, ...); `blocks/` in a path is any of them.

Two layouts of names: `original` and `diffusers` (DiT and PixArt). diffusers splits qkv in three tensors, and
repeats the timestep and label embedders in every block: rules with several diffusers keys are joined along
the first axis; rules whose diffusers key has `{i}` while the leaf is not stacked are folded into one."""
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lit_jax.checkpoint.null_caption import LEAF as NULL_CAPTION
from lit_jax.models.arch import mixers_of
from lit_jax.models.facts import Leaf, has_null_class, product
from lit_jax.models.ffn import FFNS
from lit_jax.models.mixers import find_mixer
from lit_jax.models.network import Network
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.leaves import named_leaves


@dataclass(frozen=True)
class Transform:
    """How one tensor becomes one (layer of a) leaf. Both functions return views where numpy can give one."""
    torch_shape: Callable[[tuple[int, ...]], tuple[int, ...]]              # of the leaf's shape
    to_leaf: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]           # (tensor, leaf shape)
    to_torch: Callable[[np.ndarray], np.ndarray]


TRANSFORMS = {
    # A vector, or a table that both sides hold alike.
    'copy': Transform(lambda s: s, lambda w, s: w, lambda x: x),
    # A bias whose parts and heads are axes here and one axis there.
    'flat': Transform(lambda s: (math.prod(s),), lambda w, s: w.reshape(s), lambda x: x.reshape(-1)),
    # torch (out, in) -> (in, *out): the output axes may be several (parts, heads, head dim).
    'linear': Transform(lambda s: (math.prod(s[1:]), s[0]), lambda w, s: w.T.reshape(s),
                        lambda x: x.reshape(x.shape[0], -1).T),
    # torch (out, in) -> (*in, out): the input axes may be several (heads, head dim).
    'linear_in': Transform(lambda s: (s[-1], math.prod(s[:-1])), lambda w, s: w.T.reshape(s),
                           lambda x: x.reshape(-1, x.shape[-1]).T),
    # torch OIHW -> HWIO.
    'conv': Transform(lambda s: (s[3], s[2], s[0], s[1]), lambda w, s: w.transpose(2, 3, 1, 0),
                      lambda x: x.transpose(3, 2, 0, 1)),
    # A depth-wise (C, 1, k, k) -> (k, k, *C): the channels may be several axes.
    'depthwise': Transform(lambda s: (math.prod(s[2:]), 1, s[0], s[1]),
                           lambda w, s: w.transpose(2, 3, 1, 0).reshape(s),
                           lambda x: x.reshape(*x.shape[:2], 1, -1).transpose(3, 2, 0, 1)),
    # A 1 x 1 convolution (out, in, 1, 1) that is a product here: (in, *out).
    'pointwise': Transform(lambda s: (math.prod(s[1:]), s[0], 1, 1), lambda w, s: w[..., 0, 0].T.reshape(s),
                           lambda x: x.reshape(x.shape[0], -1).T[..., None, None]),
}


LABEL_TABLE = 'y_embedder/table'      # of classes, the null class last
# diffusers' names for what stands in every block.
_NORM = 'transformer_blocks.{i}.norm1.'
_TIME = _NORM + 'emb.timestep_embedder.'
EMBEDDERS = (
    *product('x_embedder', ('p', 'p', 'C', 'D'), 'conv', 'x_embedder.proj', ('pos_embed.proj',)),
    *product('t_embedder/fc1', (256, 'D'), 'linear', 't_embedder.mlp.0', (_TIME + 'linear_1',)),
    *product('t_embedder/fc2', ('D', 'D'), 'linear', 't_embedder.mlp.2', (_TIME + 'linear_2',)),
    Leaf(LABEL_TABLE, ('R', 'D'), 'copy', 'y_embedder.embedding_table.weight',
         (_NORM + 'emb.class_embedder.embedding_table.weight',)),
)
_CROSS = 'transformer_blocks.{i}.attn2.'
_ADALN_TIME, _CAPTION = 'adaln_single.emb.timestep_embedder.', 'caption_projection.'
# PixArt-Σ: its embedders, and what its blocks have in the place of DiT's modulation.
PIXART_EMBEDDERS = (
    EMBEDDERS[0], EMBEDDERS[1],
    *product('t_embedder/fc1', (256, 'D'), 'linear', 't_embedder.mlp.0', (_ADALN_TIME + 'linear_1',)),
    *product('t_embedder/fc2', ('D', 'D'), 'linear', 't_embedder.mlp.2', (_ADALN_TIME + 'linear_2',)),
    *product('t_block', ('D', 6, 'D'), 'linear', 't_block.1', ('adaln_single.linear',)),
    *product('y_embedder/fc1', ('Y', 'D'), 'linear', 'y_embedder.y_proj.fc1', (_CAPTION + 'linear_1',)),
    *product('y_embedder/fc2', ('D', 'D'), 'linear', 'y_embedder.y_proj.fc2', (_CAPTION + 'linear_2',)),
    Leaf(NULL_CAPTION, ('L', 'Y'), 'copy', 'y_embedder.y_embedding'),
)
PIXART_REST = (
    Leaf('blocks/scale_shift_table', (6, 'D'), 'copy', 'blocks.{i}.scale_shift_table',
         ('transformer_blocks.{i}.scale_shift_table',)),
    *product('blocks/cross_attn/q', ('D', 'X', None), 'linear', 'blocks.{i}.cross_attn.q_linear',
             (_CROSS + 'to_q',)),
    *product('blocks/cross_attn/kv', ('D', 2, 'X', None), 'linear',
             'blocks.{i}.cross_attn.kv_linear', (_CROSS + 'to_k', _CROSS + 'to_v')),
    *product('blocks/cross_attn/proj', ('X', None, 'D'), 'linear_in', 'blocks.{i}.cross_attn.proj',
             (_CROSS + 'to_out.0',)),
    Leaf('final_layer/scale_shift_table', (2, 'D'), 'copy', 'final_layer.scale_shift_table',
         ('scale_shift_table',)),
    *product('final_layer/linear', ('D', 'O'), 'linear', 'final_layer.linear', ('proj_out',)),
)
REST = (
    # LightningDiT's norms with a gain.
    Leaf('blocks/norm1/gain', ('D',), 'flat', 'blocks.{i}.norm1.weight'),
    Leaf('blocks/norm2/gain', ('D',), 'flat', 'blocks.{i}.norm2.weight'),
    Leaf('final_layer/norm/gain', ('D',), 'flat', 'final_layer.norm_final.weight'),
    *product('blocks/adaLN', ('D', 6, 'D'), 'linear', 'blocks.{i}.adaLN_modulation.1', (_NORM + 'linear',)),
    *product('final_layer/adaLN', ('D', 2, 'D'), 'linear', 'final_layer.adaLN_modulation.1', ('proj_out_1',)),
    *product('final_layer/linear', ('D', 'O'), 'linear', 'final_layer.linear', ('proj_out_2',)),
)

# What blocks of a family have beside mixer, ffn and modulation. `joins` belong to the last blocks only.
FAMILIES = {'dig': (*product('blocks/dwc', (3, 3, 1, 'D'), 'depthwise', 'blocks.{i}.dw_conv'),
                    *product('joins', (None, 'D'), 'linear', 'blocks.{i}.skip_linear'))}

# The fixed sin-cos table: stored by PyTorch, computed here; read only to be compared.
POSITION_KEYS = {'original': 'pos_embed', 'diffusers': 'pos_embed.pos_embed'}
BLOCK_PREFIX = {'original': 'blocks.', 'diffusers': 'transformer_blocks.'}

# Keys of other models, for a message that names what the file is.
FOREIGN = {
    'double_blocks.': 'Flux', 'joint_blocks.': 'Stable Diffusion 3',
    'context_embedder.': 'Stable Diffusion 3 or Flux of diffusers',
    'input_blocks.': 'a Stable Diffusion U-Net', 'down_blocks.': 'a U-Net or VAE of diffusers',
    'encoder.down': 'a VAE', 'encoder.block.': 'a T5 encoder', 'text_model.': 'a CLIP text encoder',
    'attention_y_norm.': 'Sana (text to image)', 'caption_norm.': 'Sana (text to image) of diffusers',
    'cap_embedder.': 'Lumina', 'text_embedding_padding': 'Hunyuan-DiT',
    'csize_embedder.': 'PixArt-α at 1024 pixels, with its micro conditions,',
    'resolution_embedder.': 'PixArt-α at 1024 pixels, with its micro conditions,',
}


@dataclass(frozen=True)
class ModelLeaf:
    """A leaf of one architecture and its tensors: path with its run of blocks ('blocks1/attn/proj/kernel'),
    shape of one layer, and blocks in PyTorch's count (None outside)."""
    path: str
    rule: Leaf
    shape: tuple[int, ...]
    blocks: range | None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return TRANSFORMS[self.rule.transform].torch_shape(self.shape)


_RUN = re.compile(r'^blocks(\d*)/')


def split_run(path: str) -> tuple[str, int | None]:
    """'blocks1/mlp/fc1/bias' -> ('blocks/mlp/fc1/bias', 1); 0: of a single run, None: outside the blocks."""
    match = _RUN.match(path)
    return (f'blocks/{path[match.end():]}', int(match[1] or 0)) if match else (path, None)


# PyTorch's place of a mixer's and a ffn's tensors: in `original`, in diffusers.
_PARTS = {'attn': ('blocks.{i}.attn.', 'transformer_blocks.{i}.attn1.'),
          'mlp': ('blocks.{i}.mlp.', 'transformer_blocks.{i}.ff.')}


def published_leaves(part: str, kind: type) -> tuple[Leaf, ...]:
    """The leaves of a mixer ('attn') or ffn ('mlp') that PyTorch files have, with whole paths and keys."""
    original, diffusers = _PARTS[part]
    return tuple(replace(leaf, path=f'blocks/{part}/{leaf.path}', original=original + leaf.original,
                         diffusers=tuple(diffusers + key for key in leaf.diffusers))
                 for leaf in kind.leaves if leaf.original)


def rules_for(family: str, mixer: str, ffn: str) -> tuple[Leaf, ...]:
    """The leaves that such a model may have in PyTorch, in the order of the official state dicts."""
    blocks = (*published_leaves('attn', find_mixer(mixer)), *published_leaves('mlp', FFNS[ffn]))
    if family == 'pixart':
        return (*PIXART_EMBEDDERS, *blocks, *PIXART_REST)
    return (*EMBEDDERS, *blocks, *FAMILIES.get(family, ()), *REST)


def model_leaves(arch: Mapping) -> tuple[ModelLeaf, ...]:
    """The parameters among `file_leaves`."""
    return tuple(leaf for leaf in file_leaves(arch) if leaf.path != NULL_CAPTION)


def file_leaves(arch: Mapping) -> tuple[ModelLeaf, ...]:
    """Every leaf and PixArt's null caption, in the official order, those without a rule last."""
    return _model_leaves(json.dumps(arch, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _model_leaves(arch_json: str) -> tuple[ModelLeaf, ...]:
    network = Network(parse_json(arch_json, 'the architecture'))
    arch = network.arch
    tables = [{rule.path: rule for rule in rules_for(arch['family'], mixer['name'], arch['ffn'])}
              for mixer in mixers_of(arch)]
    order = {path: number for table in tables for number, path in enumerate(table)}
    shapes = {path: leaf.shape for path, leaf in named_leaves(network.abstract()).items()}
    if not has_null_class(arch):
        shapes[LABEL_TABLE] = arch['num_classes'], arch['width']
    if arch['family'] == 'pixart':
        shapes[NULL_CAPTION] = arch['caption_tokens'], arch['caption_channels']
    blocks, leaves = number_blocks(shapes), []
    for path, shape in shapes.items():
        pattern, run = split_run(path)
        rule = tables[(run or 0) % len(tables)].get(pattern) or _projector_rule(pattern) or _own_rule(pattern)
        own = blocks.get(run)
        if run is None and '{i}' in rule.original:
            own = range(arch['depth'] - shape[0], arch['depth'])
        leaves.append(ModelLeaf(path, rule, shape if own is None else shape[1:], own))
    return tuple(sorted(leaves, key=lambda leaf: (order.get(leaf.rule.path, len(order)), leaf.path)))


def _projector_rule(pattern: str) -> Leaf | None:
    """Of a leaf of REPA's projectors."""
    found = re.match(r'projectors/p(\d+)/fc(\d)/(kernel|bias)$', pattern)
    if not found:
        return None
    kernel = found[3] == 'kernel'
    return Leaf(pattern, ('D', None) if kernel else ('D',), 'linear' if kernel else 'flat',
                f'projectors.{found[1]}.{found[2]}.{"weight" if kernel else "bias"}')


def _own_rule(pattern: str) -> Leaf:
    """The rule of a leaf that no published model has: unchanged, under its own path."""
    return Leaf(pattern, (), 'copy', pattern.replace('blocks/', 'blocks.{i}.', 1).replace('/', '.'))


def number_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, range]:
    """{run: numbers of its blocks}, one run after the other, from the leading axes of leaves by path."""
    depths = {run: shape[0] for path, shape in shapes.items() if (run := split_run(path)[1]) is not None}
    ends = np.cumsum([depths[run] for run in sorted(depths)])
    runs = sorted(depths)
    return {run: range(end - depths[run], end) for run, end in zip(runs, map(int, ends), strict=True)}
