"""Softmax self-attention as in DiT: one qkv projection, scale E^-0.5, no norm of queries and keys. With
`compress` the keys and values of r x r tokens become one (PixArt-Σ, arXiv 2403.04692)."""
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.facts import Blocks, Leaf, head_problems, product
from lit_jax.models.layers import Array, HeadNorm, Linear, RmsNorm, check_grid
from lit_jax.models.mixers.fused import fused_attention
from lit_jax.models.mixers.mixer import Mixer, head_channels
from lit_jax.models.partition import constrain, partition_spec
from lit_jax.models.probe import show
from lit_jax.models.rotary import ROTARY, check_rotary, rotate
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, check_known, shown


class KeyCompressor(nnx.Module):
    """r x r neighbours of the grid -> one token: a depth-wise convolution of that stride, then LayerNorm. The
    norm is over all heads together, with gain and bias and epsilon 1e-5 (PyTorch's default). The convolution
    starts as the mean. Each channel of each head has one kernel; heads stay an axis for `tensor`."""

    def __init__(self, head: tuple[int, int], rate: int):
        self.rate = rate
        self.kernel = nnx.Param(jnp.full((rate, rate, *head), rate ** -2, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(head, jnp.float32))
        self.norm_gain = nnx.Param(jnp.ones(head, jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros(head, jnp.float32))

    def __call__(self, x_BNKE: Array, grid: tuple[int, int]) -> Array:
        """[B, N, K, E] -> [B, N/r², K, E] in the dtype of x; sums and norm in the accumulator."""
        r, (rows, columns) = self.rate, grid
        if rows % r or columns % r:
            raise UserError(f'mixer.compress {r} does not divide the grid of {rows} x {columns} tokens')
        acc = accumulator(x_BNKE.dtype)
        b, _, *head = x_BNKE.shape
        patches = x_BNKE.astype(acc).reshape(b, rows // r, r, columns // r, r, *head)
        x = (patches * self.kernel[...].astype(acc)[:, None]).sum((2, 4)) + self.bias[...].astype(acc)
        centred = x - x.mean((-2, -1), keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean((-2, -1), keepdims=True) + 1e-5)
        x = normed * self.norm_gain[...].astype(acc) + self.norm_bias[...].astype(acc)
        return x.reshape(b, -1, *head).astype(x_BNKE.dtype)


QK_NORMS = {'none': lambda channels: None, 'layer': HeadNorm, 'rms': RmsNorm}
# The projections of DiT, and where q, k, v and o lie in them.
QKV = (*product('qkv', ('D', 3, 'K', 'E'), 'linear', 'qkv', ('to_q', 'to_k', 'to_v')),
       *product('proj', ('K', 'E', 'D'), 'linear_in', 'proj', ('to_out.0',)))
QKV_PARTS = {'q': ('qkv', 0), 'k': ('qkv', 1), 'v': ('qkv', 2), 'o': ('proj', None)}


class SoftmaxAttention(Mixer):
    """Multi-head attention over all tokens: [B, N, D] -> [B, N, D].

    compress: r; one key and value for each r x r tokens (one `KeyCompressor` for both), 1 for one each.
    qk_norm: of queries and keys, over the channels of a head: 'none', 'layer' (REPA), 'rms' (LightningDiT).
    rope: queries and keys are turned by their positions (`lit_jax.models.rotary`), after that norm."""
    leaves = (*QKV, *(Leaf(f'{one}_norm/{ours}', ('E',), 'flat', f'{one}_norm.{theirs}')
                      for one in 'qk' for ours, theirs in (('gain', 'weight'), ('bias', 'bias'))),
              *product('compressor', (None, None, 'K', 'E'), 'depthwise', 'sr'),
              Leaf('compressor/norm_gain', ('K', 'E'), 'flat', 'norm.weight'),
              Leaf('compressor/norm_bias', ('K', 'E'), 'flat', 'norm.bias'))
    parts = QKV_PARTS

    @classmethod
    def suggest(cls, teacher) -> dict:
        """The teacher's own, or DiT's head of 64 channels where it is another mixer's."""
        width, mixer = teacher['width'], teacher['mixer']
        if mixer['name'] == 'softmax':
            return {name: mixer.get(name) for name in ('heads', 'qkv_bias', 'compress', 'qk_norm', 'rope')}
        return {'heads': max(n for n in range(1, max(1, width // 64) + 1) if width % n == 0)}

    @staticmethod
    def row_unit(mixer) -> int:
        """Rows of tokens that become one row of keys."""
        return mixer.get('compress', 1)

    @staticmethod
    def keys(mixer, grid) -> int:
        return math.prod(grid) // mixer.get('compress', 1) ** 2

    @classmethod
    def state_bytes(cls, mixer, width, grid) -> int:
        """Keys and values in bfloat16."""
        return 2 * 2 * cls.keys(mixer, grid) * head_channels(mixer, width)[0]

    @classmethod
    def read_torch(cls, found, hints, published) -> Blocks:
        blocks = read_qkv(found, hints, published)
        rates = [found.side('compressor/kernel', layer, 2) or 1 for layer in range(found.depth)]
        runs = [(len(list(group)), rate) for rate, group in itertools.groupby(rates)]
        if len(runs) > 1:
            blocks.stages = [{'depth': depth, **({'mixer': {'compress': rate}} if rate > 1 else {})}
                             for depth, rate in runs]
        elif runs and runs[0][1] > 1:
            blocks.mixer['compress'] = runs[0][1]
        return blocks

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = True, compress: int = 1,
                 qk_norm: str = 'none', rope: bool = False, dtype=jnp.float32, rngs: nnx.Rngs):
        check_known('mixer.qk_norm', qk_norm, QK_NORMS)
        if rope:
            check_rotary(width, heads)
        if isinstance(compress, bool) or not isinstance(compress, int) or compress < 1:
            raise UserError(f'mixer.compress must be a positive integer (1: not at all), got '
                            f'{shown(compress)}')
        head = (heads, width // heads)
        self.qkv = Linear(width, (3, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)
        self.compressor = KeyCompressor(head, compress) if compress > 1 else None
        if rope and self.compressor is not None:
            raise UserError('mixer.rope turns keys by the positions of their tokens, and mixer.compress '
                            'merges tokens: take one of them')
        make = QK_NORMS[qk_norm]
        self.q_norm, self.k_norm, self.rope = make(head[1]), make(head[1]), rope

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` matters to `compress` and `rope` only: tokens carry their positions."""
        qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
        q_BNKE, k_BMKE, v_BMKE = (qkv[:, :, i] for i in range(3))
        if self.q_norm is not None and self.k_norm is not None:
            q_BNKE, k_BMKE = self.q_norm(q_BNKE), self.k_norm(k_BMKE)
        if self.rope:
            check_grid(x_BND, grid)
            q_BNKE, k_BMKE = rotate(q_BNKE, grid), rotate(k_BMKE, grid)
        if self.compressor is not None:
            k_BMKE, v_BMKE = (constrain(self.compressor(a, grid), 'batch', 'tokens', 'heads', None)
                              for a in (k_BMKE, v_BMKE))
        return self.proj(dot_product_attention(q_BNKE, k_BMKE, v_BMKE))


def read_qkv(found, hints, published) -> Blocks:
    """Heads and bias of DiT's projections. Tensors do not show the heads: given, or those of DiT's sizes."""
    width, told = found.sizes['D'], hints.heads
    known = {(model['depth'], model['width']): model['mixer']['heads'] for model in published
             if model['mixer']['name'] == 'softmax'}
    heads = told or found.hub.get('num_attention_heads') or known.get((found.depth, width))
    problems = head_problems(heads, width)
    if told and found.hub.get('num_attention_heads', told) != told:
        problems = [f'config.json says {found.hub["num_attention_heads"]} heads, {told} were asked for']
    if hints.activation or hints.focus_power:
        problems.append('softmax attention has neither activation nor focus_power')
    more: dict[str, str | bool] = {}
    if found.holds('q_norm/gain'):
        more['qk_norm'] = 'layer' if found.holds('q_norm/bias') else 'rms'
    if ROTARY[0] in found.source.tensors:
        more['rope'] = True
    return Blocks({'heads': heads, 'qkv_bias': found.holds('qkv/bias'), **more}, problems=problems)


@jax.named_scope('softmax')
def dot_product_attention(q_BNKE: Array, k_BMKE: Array, v_BMKE: Array) -> Array:
    """softmax(q·kᵀ/√E)·v for each head, [B, N, K, E] in the dtype of q; logits and sums in the accumulator.
    On a mesh each device attends for its own images, heads and queries; keys and values are gathered along
    `seq`. First derivatives only. Shows 'softmax/query' and 'softmax/key'."""
    show('softmax/query', q_BNKE)
    show('softmax/key', k_BMKE)
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    return heads_first(_on_mesh(*map(heads_first, (q_BNKE, k_BMKE, v_BMKE))))


def _on_mesh(q_BKNE: Array, k_BKME: Array, v_BKME: Array) -> Array:
    if jax.sharding.get_abstract_mesh().size <= 1:
        return fused_attention(q_BKNE, k_BKME, v_BKME)
    # By hand: a kernel cannot be cut by the compiler, and a loop over heads would gather them all.
    rows = partition_spec(q_BKNE.shape, 'batch', 'heads', 'tokens', None)
    whole = partition_spec(k_BKME.shape, 'batch', 'heads', None, None)
    return jax.shard_map(fused_attention, in_specs=(rows, whole, whole), out_specs=rows, check_vma=False)(
        q_BKNE, k_BKME, v_BKME)
