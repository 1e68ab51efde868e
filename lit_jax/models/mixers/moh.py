"""Mixture-of-head attention (MoH, arXiv 2410.11842): softmax attention with heads weighted for each token.

Every token uses the shared heads; of the others, the routed ones, it uses the few that its router ranks
highest. All heads are computed, as in the official code; only the sum is restricted."""
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.facts import Blocks, Leaf
from lit_jax.models.layers import Array, Linear
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.mixers.softmax import QKV, QKV_PARTS, SoftmaxAttention, dot_product_attention
from lit_jax.models.partition import constrain
from lit_jax.models.probe import show
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown


class MohAttention(Mixer):
    """proj(Σ over heads of weight·attention), the weights a function of the token: [B, N, D] -> [B, N, D].

    Shared heads come first in the head axis. Their weights are a softmax times their number (mean 1); those
    of the routed heads are the `routed` largest of a softmax over the rest, scaled to the sum `routed`. With
    both kinds a third softmax of two, times 2, weighs one kind against the other.

    Shows 'balance', the official load-balance loss, in layers that route; the official total is its mean over
    those layers, so the others show nothing. Its means are over all tokens of the batch.

    Args:
        heads: all of them. shared: number of shared ones. routed: number of the others that a token uses.
        head_dim: E, where heads·E is not the width."""
    losses = ('balance',)
    leaves = (*QKV, *(Leaf(f'{ours}/kernel', ('D', None), 'linear', f'{theirs}.weight') for ours, theirs in (
        ('router', 'wg'), ('kinds_router', 'wg_0'), ('shared_router', 'wg_1'))))
    parts, state_bytes = QKV_PARTS, SoftmaxAttention.state_bytes

    @classmethod
    def suggest(cls, teacher) -> dict:
        """The teacher's heads: half of them shared, and a third of all routed, as in the smallest MoH-DiT."""
        heads = teacher['mixer'].get('heads') or 1
        shared = -(-heads // 2)
        return {'heads': heads, 'shared': shared, 'routed': min(max(1, heads // 3), heads - shared)}

    @classmethod
    def read_torch(cls, found, hints, published) -> Blocks:
        """Routers show shared and routed heads of a layer, qkv their width; `routed` is not in the file."""
        problems, layers = [], []
        for layer in range(found.depth):
            experts = found.side('router/kernel', layer, 0)
            # One shared head has no router of its own, only that between the two kinds.
            shared = found.side('shared_router/kernel', layer, 0) or int(
                not experts or found.side('kinds_router/kernel', layer, 0) > 0)
            heads, rows = experts + shared, found.side('qkv/kernel', layer, 0)
            if rows % (3 * heads):
                problems.append(f'the {rows} rows of blocks.{layer}.attn.qkv.weight do not fit {heads} heads')
            layers.append({'heads': heads, 'shared': shared, 'head_dim': max(1, rows // (3 * heads))})
        if hints.heads:
            problems.append('MoH-DiT shows its heads; leave --heads out')
        if hints.activation or hints.focus_power:
            problems.append('softmax attention has neither activation nor focus_power')
        routed = _published_routes(layers, found, hints, published)
        if routed is None:
            problems.append('how many of the routed heads a token uses cannot be seen in the file, and this '
                            'is none of the published sizes of MoH-DiT; give --routed N, or --routed N,N,... '
                            f'with a number for each of the {found.depth} layers')
            routed = [1] * found.depth
        for one, number in zip(layers, routed, strict=True):
            one['routed'] = min(number, one['heads'] - one['shared'])
        return Blocks(*_runs_of(layers, found.holds('qkv/bias')), problems)

    def __init__(self, width: int, *, heads: int, shared: int, routed: int, head_dim: int | None = None,
                 qkv_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        _check_counts(heads, shared, routed)
        head, experts = (heads, head_dim or width // heads), heads - shared
        self.shared, self.experts, self.routed, self.dtype = shared, experts, routed, dtype
        self.qkv = Linear(width, (3, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)
        # Routing in the accumulator: in 16 bit the two best heads of a token would often be equal.
        linear = functools.partial(Linear, bias=False, dtype=accumulator(dtype), rngs=rngs)
        self.kinds_router = linear(width, 2) if shared and experts else None
        self.shared_router = linear(width, shared) if shared > 1 else None
        self.router: Any = linear(width, experts) if experts else None

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` is not used: tokens carry their positions."""
        qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
        q_BNKE, k_BNKE, v_BNKE = (qkv[:, :, i] for i in range(3))
        weights_BNK = constrain(self.head_weights(x_BND), 'batch', 'tokens', 'heads')
        o_BNKE = dot_product_attention(q_BNKE, k_BNKE, v_BNKE)
        return self.proj((o_BNKE * weights_BNK[..., None]).astype(self.dtype))

    def head_weights(self, x_BND: Array) -> Array:
        """Weights of the heads [B, N, K], in the accumulator; a token's sum to the number of heads in use."""
        lead, acc = x_BND.shape[:2], accumulator(self.dtype)
        parts = []
        if self.shared:
            parts.append(jnp.ones((*lead, 1), acc) if self.shared_router is None
                         else jax.nn.softmax(self.shared_router(x_BND)) * self.shared)
        if self.experts:
            parts.append(self._route(jax.nn.softmax(self.router(x_BND))))
        if self.kinds_router is not None:
            kinds_BN2 = jax.nn.softmax(self.kinds_router(x_BND)) * 2
            parts = [part * kinds_BN2[..., i:i + 1] for i, part in enumerate(parts)]
        return jnp.concatenate(parts, axis=-1)

    def _route(self, p_BNX: Array) -> Array:
        """Probabilities of routed heads -> weights: 0 for all but the largest, which sum to their number."""
        best_BNR = jax.lax.top_k(p_BNX, self.routed)[1]
        mask_BNX = jax.nn.one_hot(best_BNR, self.experts, dtype=p_BNX.dtype).sum(-2)
        show('balance', lambda: self.experts ** 2 * (p_BNX.mean((0, 1)) * mask_BNX.mean((0, 1))).mean())
        kept = p_BNX * mask_BNX
        return kept / kept.sum(-1, keepdims=True) * self.routed


def _check_counts(heads: int, shared: int, routed: int) -> None:
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (shared, routed)):
        raise UserError(f'mixer.shared and mixer.routed are numbers of heads, got {shown(shared)} and '
                        f'{shown(routed)}')
    if shared > heads:
        raise UserError(f'mixer.shared {shared} is more than the {heads} heads')
    if not min(1, heads - shared) <= routed <= heads - shared:
        possible = f'1 to {heads - shared}' if shared < heads else '0'
        raise UserError(f'of {heads} heads {shared} are shared, which leaves {heads - shared} to choose '
                        f'from: mixer.routed must be {possible}, got {routed}')


def _runs_of(layers: Sequence[Mapping], qkv_bias: bool) -> tuple[dict, list[dict]]:
    """(mixer, stages) of layers' heads, shared, routed and head_dim, as in `lit_jax.recipes.systems`."""
    names = ('heads', 'shared', 'routed', 'head_dim')
    runs = [(len(list(group)), layer) for layer, group in itertools.groupby(layers)]
    own = names if len({layer['head_dim'] for layer in layers}) > 1 else names[:3]
    stages = [{'depth': depth, 'mixer': {name: run[name] for name in own}} for depth, run in runs]
    return ({name: layers[0][name] for name in names} | {'qkv_bias': qkv_bias},
            stages if len(runs) > 1 else [])


def _published_routes(layers: Sequence[Mapping], found, hints, published) -> list[int] | None:
    """Each layer's `routed`: the caller's, or that of the published size with these heads."""
    if hints.routed and len(hints.routed) in (1, found.depth):
        return list(hints.routed * found.depth if len(hints.routed) == 1 else hints.routed)
    heads = [(layer['heads'], layer['shared']) for layer in layers]
    for model in published:
        own = [{**model['mixer'], **stage.get('mixer', {})} for stage in model['stages']
               for _ in range(stage['depth'])]
        known = [(mixer['heads'], mixer.get('shared')) for mixer in own]
        if model['width'] == found.sizes['D'] and known == heads:
            return [mixer['routed'] for mixer in own]
    return None
