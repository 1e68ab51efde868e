"""The tables between PyTorch's tensors and our parameter tree: names, shapes, and a named transform with its
inverse.

One `Rule` a leaf that some published PyTorch model has: DiT, LiT (as DiT, with its attention named q, kv,
proj, dwc as in the paper's Algorithm 1), MoH-DiT, DiG, PixArt-Σ's compressed keys and Sana's Mix-FFN. A leaf
without a rule (EDiT, DyDi-LiT and U-DiG have no official code) goes under its own path as it lies:
`blocks/attn/fusion/norm/gain` of block 3 is `blocks.3.attn.fusion.norm.gain`, outside the blocks the whole
leaf. `{i}` in a key is the block, counted through all runs of unlike blocks (`blocks0/`, `blocks1/`, ...);
`blocks/` in a rule's path stands for any of them.

Letters in a rule's shape, for reading sizes off a file: D width, F inner width of the ffn, K heads, E head
dim, p patch, C channels, O output features of a token, R rows of the label table, k side of the depth-wise
kernel, Q channels of all keys and V of a head's values (DiG); X heads of the cross-attention, Y channels and
L tokens of a caption (PixArt); None: read nothing.

Two layouts of names are known: `original` and `diffusers` (DiT and PixArt). diffusers splits qkv in three
tensors, and keeps a copy of the timestep and label embedders in every block: rules with several diffusers
keys are joined along the first axis, rules whose diffusers key has `{i}` while the leaf is not stacked are
folded into one.
"""
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lit_jax.checkpoint.null_caption import LEAF as NULL_CAPTION
from lit_jax.models.arch import mixers_of
from lit_jax.models.network import Network
from lit_jax.runtime.leaves import named_leaves


@dataclass(frozen=True)
class Transform:
    """How one tensor becomes one (layer of a) leaf. Both functions return views where numpy can give one."""
    torch_shape: Callable[[tuple[int, ...]], tuple[int, ...]]              # of the leaf's shape
    to_leaf: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]           # (tensor, leaf shape)
    to_torch: Callable[[np.ndarray], np.ndarray]


def _product(shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


TRANSFORMS = {
    # A vector, or a table that both sides hold alike.
    'copy': Transform(lambda s: s, lambda w, s: w, lambda x: x),
    # A bias whose parts and heads are axes here and one axis there.
    'flat': Transform(lambda s: (_product(s),), lambda w, s: w.reshape(s), lambda x: x.reshape(-1)),
    # torch (out, in) -> (in, *out): the output axes may be several (parts, heads, head dim).
    'linear': Transform(lambda s: (_product(s[1:]), s[0]), lambda w, s: w.T.reshape(s),
                        lambda x: x.reshape(x.shape[0], -1).T),
    # torch (out, in) -> (*in, out): the input axes may be several (heads, head dim).
    'linear_in': Transform(lambda s: (s[-1], _product(s[:-1])), lambda w, s: w.T.reshape(s),
                           lambda x: x.reshape(-1, x.shape[-1]).T),
    # torch OIHW -> HWIO.
    'conv': Transform(lambda s: (s[3], s[2], s[0], s[1]), lambda w, s: w.transpose(2, 3, 1, 0),
                      lambda x: x.transpose(3, 2, 0, 1)),
    # A depth-wise (C, 1, k, k) -> (k, k, *C): the channels may be several axes.
    'depthwise': Transform(lambda s: (_product(s[2:]), 1, s[0], s[1]),
                           lambda w, s: w.transpose(2, 3, 1, 0).reshape(s),
                           lambda x: x.reshape(*x.shape[:2], 1, -1).transpose(3, 2, 0, 1)),
    # A 1 x 1 convolution (out, in, 1, 1) that is a product here: (in, *out).
    'pointwise': Transform(lambda s: (_product(s[1:]), s[0], 1, 1), lambda w, s: w[..., 0, 0].T.reshape(s),
                           lambda x: x.reshape(x.shape[0], -1).T[..., None, None]),
}


@dataclass(frozen=True)
class Rule:
    """One leaf of the parameter tree and where its values lie in a PyTorch file."""
    path: str                        # 'blocks/attn/q/kernel'
    shape: tuple                     # of one layer, letters, integers or None
    transform: str                   # a key of TRANSFORMS
    original: str                    # torch key; {i} = block
    diffusers: tuple[str, ...] = ()  # torch keys joined along axis 0; empty: diffusers has no such model

    def keys(self, layout: str) -> tuple[str, ...]:
        """The key patterns of this leaf in `layout`, in the order in which they are joined."""
        return (self.original,) if layout == 'original' else self.diffusers


# diffusers' names for what stands in every block.
_NORM, _ATTN = 'transformer_blocks.{i}.norm1.', 'transformer_blocks.{i}.attn1.'
_TIME, _MLP = _NORM + 'emb.timestep_embedder.', 'transformer_blocks.{i}.ff.net.'


def _pair(path, kernel_shape, transform, bias_shape, original, diffusers=()) -> tuple:
    """The rules of a weight and its bias."""
    return (Rule(f'{path}/kernel', kernel_shape, transform, f'{original}.weight',
                 tuple(f'{key}.weight' for key in diffusers)),
            Rule(f'{path}/bias', bias_shape, 'flat', f'{original}.bias',
                 tuple(f'{key}.bias' for key in diffusers)))


EMBEDDERS = (
    *_pair('x_embedder', ('p', 'p', 'C', 'D'), 'conv', ('D',), 'x_embedder.proj', ('pos_embed.proj',)),
    *_pair('t_embedder/fc1', (256, 'D'), 'linear', ('D',), 't_embedder.mlp.0', (_TIME + 'linear_1',)),
    *_pair('t_embedder/fc2', ('D', 'D'), 'linear', ('D',), 't_embedder.mlp.2', (_TIME + 'linear_2',)),
    Rule('y_embedder/table', ('R', 'D'), 'copy', 'y_embedder.embedding_table.weight',
         (_NORM + 'emb.class_embedder.embedding_table.weight',)),
)
_QKV = (
    *_pair('blocks/attn/qkv', ('D', 3, 'K', 'E'), 'linear', (3, 'K', 'E'), 'blocks.{i}.attn.qkv',
           (_ATTN + 'to_q', _ATTN + 'to_k', _ATTN + 'to_v')),
    *_pair('blocks/attn/proj', ('K', 'E', 'D'), 'linear_in', ('D',), 'blocks.{i}.attn.proj',
           (_ATTN + 'to_out.0',)),
)
_COMPRESSOR = (
    *_pair('blocks/attn/compressor', (None, None, 'K', 'E'), 'depthwise', ('K', 'E'), 'blocks.{i}.attn.sr'),
    Rule('blocks/attn/compressor/norm_gain', ('K', 'E'), 'flat', 'blocks.{i}.attn.norm.weight'),
    Rule('blocks/attn/compressor/norm_bias', ('K', 'E'), 'flat', 'blocks.{i}.attn.norm.bias'),
)
_ROUTERS = tuple(Rule(f'blocks/attn/{ours}/kernel', ('D', None), 'linear',
                      f'blocks.{{i}}.attn.{theirs}.weight')
                 for ours, theirs in (('router', 'wg'), ('kinds_router', 'wg_0'), ('shared_router', 'wg_1')))
ATTENTION = {
    'softmax': _QKV + _COMPRESSOR,
    'linear': (
        *_pair('blocks/attn/q', ('D', 'K', 'E'), 'linear', ('K', 'E'), 'blocks.{i}.attn.q'),
        *_pair('blocks/attn/kv', ('D', 2, 'K', 'E'), 'linear', (2, 'K', 'E'), 'blocks.{i}.attn.kv'),
        *_pair('blocks/attn/proj', ('K', 'E', 'D'), 'linear_in', ('D',), 'blocks.{i}.attn.proj'),
        *_pair('blocks/attn/dwc', ('k', 'k', 1, 'E'), 'depthwise', ('E',), 'blocks.{i}.attn.dwc'),
    ),
    'moh': _QKV + _ROUTERS,
    'sana': _QKV,
    'gla': (
        Rule('blocks/attn/q/kernel', ('D', 'Q'), 'linear', 'blocks.{i}.attn.q_proj.weight'),
        Rule('blocks/attn/key/kernel', ('D', 'Q'), 'linear', 'blocks.{i}.attn.k_proj.weight'),
        Rule('blocks/attn/value/kernel', ('D', 'D'), 'linear', 'blocks.{i}.attn.v_proj.weight'),
        Rule('blocks/attn/gate/kernel', ('D', 'D'), 'linear', 'blocks.{i}.attn.g_proj.weight'),
        Rule('blocks/attn/decay_in/kernel', ('D', None), 'linear', 'blocks.{i}.attn.gk_proj.0.weight'),
        *_pair('blocks/attn/decay_out', (None, 'Q'), 'linear', ('Q',), 'blocks.{i}.attn.gk_proj.1'),
        Rule('blocks/attn/norm_gain', ('V',), 'copy', 'blocks.{i}.attn.g_norm_swish_gate.weight'),
        Rule('blocks/attn/proj/kernel', ('D', 'D'), 'linear_in', 'blocks.{i}.attn.o_proj.weight'),
    ),
}
_CROSS = 'transformer_blocks.{i}.attn2.'
_ADALN = 'adaln_single.'
# PixArt-Σ: its embedders, and what its blocks have in the place of DiT's modulation.
PIXART_EMBEDDERS = (
    EMBEDDERS[0], EMBEDDERS[1],
    *_pair('t_embedder/fc1', (256, 'D'), 'linear', ('D',), 't_embedder.mlp.0',
           (_ADALN + 'emb.timestep_embedder.linear_1',)),
    *_pair('t_embedder/fc2', ('D', 'D'), 'linear', ('D',), 't_embedder.mlp.2',
           (_ADALN + 'emb.timestep_embedder.linear_2',)),
    *_pair('t_block', ('D', 6, 'D'), 'linear', (6, 'D'), 't_block.1', (_ADALN + 'linear',)),
    *_pair('y_embedder/fc1', ('Y', 'D'), 'linear', ('D',), 'y_embedder.y_proj.fc1',
           ('caption_projection.linear_1',)),
    *_pair('y_embedder/fc2', ('D', 'D'), 'linear', ('D',), 'y_embedder.y_proj.fc2',
           ('caption_projection.linear_2',)),
    Rule(NULL_CAPTION, ('L', 'Y'), 'copy', 'y_embedder.y_embedding'),
)
PIXART_REST = (
    Rule('blocks/scale_shift_table', (6, 'D'), 'copy', 'blocks.{i}.scale_shift_table',
         ('transformer_blocks.{i}.scale_shift_table',)),
    *_pair('blocks/cross_attn/q', ('D', 'X', None), 'linear', ('X', None), 'blocks.{i}.cross_attn.q_linear',
           (_CROSS + 'to_q',)),
    *_pair('blocks/cross_attn/kv', ('D', 2, 'X', None), 'linear', (2, 'X', None),
           'blocks.{i}.cross_attn.kv_linear', (_CROSS + 'to_k', _CROSS + 'to_v')),
    *_pair('blocks/cross_attn/proj', ('X', None, 'D'), 'linear_in', ('D',), 'blocks.{i}.cross_attn.proj',
           (_CROSS + 'to_out.0',)),
    Rule('final_layer/scale_shift_table', (2, 'D'), 'copy', 'final_layer.scale_shift_table',
         ('scale_shift_table',)),
    *_pair('final_layer/linear', ('D', 'O'), 'linear', ('O',), 'final_layer.linear', ('proj_out',)),
)
FFNS = {
    'mlp': (
        *_pair('blocks/mlp/fc1', ('D', 'F'), 'linear', ('F',), 'blocks.{i}.mlp.fc1', (_MLP + '0.proj',)),
        *_pair('blocks/mlp/fc2', ('F', 'D'), 'linear', ('D',), 'blocks.{i}.mlp.fc2', (_MLP + '2',)),
    ),
    'swiglu': (
        Rule('blocks/mlp/gate/kernel', ('D', 2, 'F'), 'linear', 'blocks.{i}.mlp.gate_proj.weight'),
        Rule('blocks/mlp/down/kernel', ('F', 'D'), 'linear', 'blocks.{i}.mlp.down_proj.weight'),
    ),
    'mix': (
        *_pair('blocks/mlp/inverted', ('D', 2, 'F'), 'pointwise', (2, 'F'),
               'blocks.{i}.mlp.inverted_conv.conv'),
        *_pair('blocks/mlp/depth', (3, 3, 2, 'F'), 'depthwise', (2, 'F'), 'blocks.{i}.mlp.depth_conv.conv'),
        Rule('blocks/mlp/point/kernel', ('F', 'D'), 'pointwise', 'blocks.{i}.mlp.point_conv.conv.weight'),
    ),
}
REST = (
    *_pair('blocks/adaLN', ('D', 6, 'D'), 'linear', (6, 'D'), 'blocks.{i}.adaLN_modulation.1',
           (_NORM + 'linear',)),
    *_pair('final_layer/adaLN', ('D', 2, 'D'), 'linear', (2, 'D'), 'final_layer.adaLN_modulation.1',
           ('proj_out_1',)),
    *_pair('final_layer/linear', ('D', 'O'), 'linear', ('O',), 'final_layer.linear', ('proj_out_2',)),
)

# What blocks of a family have beside mixer, ffn and modulation. `joins` belong to the last blocks only.
FAMILIES = {
    'dig': (
        *_pair('blocks/dwc', (3, 3, 1, 'D'), 'depthwise', ('D',), 'blocks.{i}.dw_conv'),
        *_pair('joins', (None, 'D'), 'linear', ('D',), 'blocks.{i}.skip_linear'),
    ),
}

# The fixed sin-cos table: stored by PyTorch, computed here; read only to be compared.
POSITION_KEYS = {'original': 'pos_embed', 'diffusers': 'pos_embed.pos_embed'}
BLOCK_PREFIX = {'original': 'blocks.', 'diffusers': 'transformer_blocks.'}

# Keys that tell other models apart from those that are read, for a message that names what the file is.
FOREIGN = {
    'double_blocks.': 'Flux',
    'input_blocks.': 'a Stable Diffusion U-Net',
    'down_blocks.': 'a U-Net or VAE of diffusers',
    'encoder.down': 'a VAE',
    'encoder.block.': 'a T5 encoder',
    'text_model.': 'a CLIP text encoder',
    'attention_y_norm.': 'Sana (text to image)',
    'caption_norm.': 'Sana (text to image) of diffusers',
    'joint_blocks.': 'Stable Diffusion 3',
    'context_embedder.': 'Stable Diffusion 3 or Flux of diffusers',
    'cap_embedder.': 'Lumina',
    'text_embedding_padding': 'Hunyuan-DiT',
    'csize_embedder.': 'PixArt-α at 1024 pixels, with its micro conditions,',
    'resolution_embedder.': 'PixArt-α at 1024 pixels, with its micro conditions,',
}


# ------------------------------------------------------------------------------------------------------
# The leaves of one model


@dataclass(frozen=True)
class ModelLeaf:
    """A leaf of one architecture and its tensors.

    Attributes:
        path: in the parameter tree, with the number of its run of blocks: 'blocks1/attn/proj/kernel'.
        shape: of one layer. blocks: the numbers of its blocks in PyTorch's count; None outside the blocks.
    """
    path: str
    rule: Rule
    shape: tuple[int, ...]
    blocks: range | None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return TRANSFORMS[self.rule.transform].torch_shape(self.shape)


_RUN = re.compile(r'^blocks(\d*)/')


def split_run(path: str) -> tuple[str, int | None]:
    """'blocks1/mlp/fc1/bias' -> ('blocks/mlp/fc1/bias', 1); ('blocks/...', 0) of a single run; None outside
    the blocks."""
    match = _RUN.match(path)
    return (f'blocks/{path[match.end():]}', int(match[1] or 0)) if match else (path, None)


def rules_for(family: str, mixer: str, ffn: str) -> tuple[Rule, ...]:
    """The rules that leaves of a model with this mixer and ffn may have, in the order of the official state
    dicts."""
    if family == 'pixart':
        return (*PIXART_EMBEDDERS, *ATTENTION.get(mixer, ()), *FFNS.get(ffn, ()), *PIXART_REST)
    return (*EMBEDDERS, *ATTENTION.get(mixer, ()), *FFNS.get(ffn, ()), *FAMILIES.get(family, ()), *REST)


def model_leaves(arch: Mapping) -> tuple[ModelLeaf, ...]:
    """The parameters among `file_leaves`."""
    return tuple(leaf for leaf in file_leaves(arch) if leaf.path != NULL_CAPTION)


def file_leaves(arch: Mapping) -> tuple[ModelLeaf, ...]:
    """Every leaf of an architecture and PixArt's null caption, in the order of the official state dicts;
    leaves without a rule come last.

    Raises UserError where no such network can be built.
    """
    return _model_leaves(json.dumps(arch, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _model_leaves(arch_json: str) -> tuple[ModelLeaf, ...]:
    network = Network(json.loads(arch_json))
    arch = network.arch
    tables = [{rule.path: rule for rule in rules_for(arch['family'], mixer['name'], arch['ffn'])}
              for mixer in mixers_of(arch)]
    order = {path: number for table in tables for number, path in enumerate(table)}
    shapes = {path: leaf.shape for path, leaf in named_leaves(network.abstract()).items()}
    if arch['family'] == 'pixart':
        shapes[NULL_CAPTION] = arch['caption_tokens'], arch['caption_channels']
    blocks, leaves = number_blocks(shapes), []
    for path, shape in shapes.items():
        pattern, run = split_run(path)
        rule = tables[(run or 0) % len(tables)].get(pattern) or _own_rule(pattern)
        own = blocks.get(run)
        if run is None and '{i}' in rule.original:
            own = range(arch['depth'] - shape[0], arch['depth'])
        leaves.append(ModelLeaf(path, rule, shape if own is None else shape[1:], own))
    return tuple(sorted(leaves, key=lambda leaf: (order.get(leaf.rule.path, len(order)), leaf.path)))


def _own_rule(pattern: str) -> Rule:
    """The rule of a leaf that no published model has: as it lies, under its own path."""
    return Rule(pattern, (), 'copy', pattern.replace('blocks/', 'blocks.{i}.', 1).replace('/', '.'))


def number_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, range]:
    """{run: numbers of its blocks}, from the leading axes of leaves by path; one run comes after the
    other."""
    depths = {run: shape[0] for path, shape in shapes.items() if (run := split_run(path)[1]) is not None}
    ends = np.cumsum([depths[run] for run in sorted(depths)])
    return {run: range(end - depths[run], end)
            for run, end in zip(sorted(depths), ends.tolist(), strict=True)}
