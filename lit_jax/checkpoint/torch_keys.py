"""The table between PyTorch's tensors and our parameter tree: names, shapes, and a named transform with its inverse.

One `Rule` a leaf. `{i}` in a key is the block; leaves under `blocks/` stack all blocks on a leading axis. Shapes are
written with letters that `dimensions` resolves: D width, F mlp width, K heads, E head dim, p patch, C channels,
O output features of a token, R rows of the label table, k side of the depth-wise kernel.

Two layouts of names are known: `original` (facebookresearch/DiT, and LiT with its attention named q, kv, proj, dwc as
in the paper's Algorithm 1) and `diffusers` (DiT only). diffusers splits qkv in three tensors, and keeps a copy of the
timestep and label embedders in every block: rules with several diffusers keys are joined along the first axis, rules
whose diffusers key has `{i}` while the leaf is not stacked are folded into one.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


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
    # torch OIHW -> HWIO. A depth-wise (E, 1, k, k) becomes (k, k, 1, E).
    'conv': Transform(lambda s: (s[3], s[2], s[0], s[1]), lambda w, s: w.transpose(2, 3, 1, 0),
                      lambda x: x.transpose(3, 2, 0, 1)),
}


@dataclass(frozen=True)
class Rule:
    """One leaf of the parameter tree and where its values lie in a PyTorch file."""
    path: str                        # 'blocks/attn/q/kernel'
    shape: tuple                     # of one layer, letters or integers
    transform: str                   # a key of TRANSFORMS
    original: str                    # torch key; {i} = block
    diffusers: tuple[str, ...] = ()  # torch keys joined along axis 0; empty: diffusers has no such model
    needs: str = ''                  # option of the mixer without which the leaf does not exist

    @property
    def stacked(self) -> bool:
        return self.path.startswith('blocks/')

    def keys(self, layout: str) -> tuple[str, ...]:
        """The key patterns of this leaf in `layout`, in the order in which they are joined."""
        return (self.original,) if layout == 'original' else self.diffusers


# diffusers' names for what stands in every block.
_NORM, _ATTN = 'transformer_blocks.{i}.norm1.', 'transformer_blocks.{i}.attn1.'
_TIME, _MLP = _NORM + 'emb.timestep_embedder.', 'transformer_blocks.{i}.ff.net.'


def _pair(path, kernel_shape, transform, bias_shape, original, diffusers=(), needs='', bias_needs='') -> tuple:
    """The rules of a weight and its bias."""
    return (Rule(f'{path}/kernel', kernel_shape, transform, f'{original}.weight',
                 tuple(f'{key}.weight' for key in diffusers), needs),
            Rule(f'{path}/bias', bias_shape, 'flat', f'{original}.bias',
                 tuple(f'{key}.bias' for key in diffusers), bias_needs or needs))


EMBEDDERS = (
    *_pair('x_embedder', ('p', 'p', 'C', 'D'), 'conv', ('D',), 'x_embedder.proj', ('pos_embed.proj',)),
    *_pair('t_embedder/fc1', (256, 'D'), 'linear', ('D',), 't_embedder.mlp.0', (_TIME + 'linear_1',)),
    *_pair('t_embedder/fc2', ('D', 'D'), 'linear', ('D',), 't_embedder.mlp.2', (_TIME + 'linear_2',)),
    Rule('y_embedder/table', ('R', 'D'), 'copy', 'y_embedder.embedding_table.weight',
         (_NORM + 'emb.class_embedder.embedding_table.weight',)),
)
ATTENTION = {
    'softmax': (
        *_pair('blocks/attn/qkv', ('D', 3, 'K', 'E'), 'linear', (3, 'K', 'E'), 'blocks.{i}.attn.qkv',
               (_ATTN + 'to_q', _ATTN + 'to_k', _ATTN + 'to_v'), bias_needs='qkv_bias'),
        *_pair('blocks/attn/proj', ('K', 'E', 'D'), 'linear_in', ('D',), 'blocks.{i}.attn.proj', (_ATTN + 'to_out.0',)),
    ),
    'linear': (
        *_pair('blocks/attn/q', ('D', 'K', 'E'), 'linear', ('K', 'E'), 'blocks.{i}.attn.q', bias_needs='qkv_bias'),
        *_pair('blocks/attn/kv', ('D', 2, 'K', 'E'), 'linear', (2, 'K', 'E'), 'blocks.{i}.attn.kv',
               bias_needs='qkv_bias'),
        *_pair('blocks/attn/proj', ('K', 'E', 'D'), 'linear_in', ('D',), 'blocks.{i}.attn.proj'),
        *_pair('blocks/attn/dwc', ('k', 'k', 1, 'E'), 'conv', ('E',), 'blocks.{i}.attn.dwc', needs='dwc_kernel'),
    ),
}
REST = (
    *_pair('blocks/mlp/fc1', ('D', 'F'), 'linear', ('F',), 'blocks.{i}.mlp.fc1', (_MLP + '0.proj',)),
    *_pair('blocks/mlp/fc2', ('F', 'D'), 'linear', ('D',), 'blocks.{i}.mlp.fc2', (_MLP + '2',)),
    *_pair('blocks/adaLN', ('D', 6, 'D'), 'linear', (6, 'D'), 'blocks.{i}.adaLN_modulation.1', (_NORM + 'linear',)),
    *_pair('final_layer/adaLN', ('D', 2, 'D'), 'linear', (2, 'D'), 'final_layer.adaLN_modulation.1', ('proj_out_1',)),
    *_pair('final_layer/linear', ('D', 'O'), 'linear', ('O',), 'final_layer.linear', ('proj_out_2',)),
)

# The fixed sin-cos table: stored by PyTorch, computed here; read only to be compared.
POSITION_KEYS = {'original': 'pos_embed', 'diffusers': 'pos_embed.pos_embed'}
BLOCK_PREFIX = {'original': 'blocks.', 'diffusers': 'transformer_blocks.'}

# Keys that tell other models apart from DiT and LiT, for a message that names what the file is.
FOREIGN = {
    'y_embedder.y_embedding': 'PixArt (text-to-image)',
    'caption_projection': 'a text-to-image transformer of diffusers (PixArt or Sana)',
    'scale_shift_table': 'a model with one shared modulation (PixArt or Sana)',
    '.attn.wg': 'MoH-DiT',
    '.attn.gk_proj': 'DiG',
    'double_blocks.': 'Flux',
    'input_blocks.': 'a Stable Diffusion U-Net',
    'down_blocks.': 'a U-Net or VAE of diffusers',
    'encoder.down': 'a VAE',
    'encoder.block.': 'a T5 encoder',
    'text_model.': 'a CLIP text encoder',
}


def rules_for(mixer: Mapping) -> tuple[Rule, ...]:
    """The rules of every leaf that a model with this mixer has, in the order of DiT's state dict."""
    rules = (*EMBEDDERS, *ATTENTION[mixer['name']], *REST)
    return tuple(rule for rule in rules if not rule.needs or mixer.get(rule.needs))


def dimensions(arch: Mapping) -> dict[str, int]:
    """The letters of the table for one architecture."""
    width, heads = arch['width'], arch['mixer']['heads']
    channels = arch['channels'] * (2 if arch.get('learn_sigma', True) else 1)
    return {'D': width, 'F': int(width * arch.get('mlp_ratio', 4.0)), 'K': heads, 'E': width // heads,
            'p': arch['patch'], 'C': arch['channels'], 'O': arch['patch'] ** 2 * channels,
            'R': arch['num_classes'] + 1, 'k': arch['mixer'].get('dwc_kernel', 0)}


def leaf_shape(rule: Rule, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one layer of the leaf."""
    return tuple(dims[side] if isinstance(side, str) else side for side in rule.shape)


def unflatten(flat: Mapping) -> dict:
    """{'a/b': x} -> {'a': {'b': x}}, the inverse of `leaves.named_leaves`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
