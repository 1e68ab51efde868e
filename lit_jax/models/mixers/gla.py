"""The gated linear attention of DiG (arXiv 2405.18428; the layer of arXiv 2312.06635 with few keys a head).

A state is carried along the tokens in order, decays by gates that each token computes, and is read by each
token's query (`lit_jax.models.mixers.gla_chunked`). A token sees only those before it; DiG reorders the
tokens between blocks (`lit_jax.models.dig`).

Paper and official code disagree; the code produced the published figures:

- the paper (eq. 5, 6) gates rows and columns of the state, G = αᵀβ; the code has only α: `value_gate`.
- the paper (eq. 11) has LayerNorm on a head, the code RMSNorm with a gain, epsilon 1e-6: `norm`.
- the paper (eq. 10) has a bias in the output gate, the code none: `gate_bias`.
- the paper's α is one product with x, the code's goes through 16 channels, and the temperature τ is 16."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.facts import Blocks, Leaf, product
from lit_jax.models.layers import Array, Linear, check_grid, layer_norm, xavier_uniform
from lit_jax.models.mixers.gla_chunked import chunked_gla, recurrent_gla
from lit_jax.models.mixers.mixer import Mixer, head_channels
from lit_jax.models.partition import constrain, partition_spec
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

TEMPERATURE = 16    # τ: the gates are σ(.)^(1/16), which start near 0.96
RANK = 16           # inner channels of the gates' projection
EPS = 1e-6
# Ways through the grid: (columns before rows, last token first)
DIRECTIONS = {'causal': ((False, False),),
              'bidirectional': ((False, False), (False, True)),
              'four': ((False, False), (False, True), (True, False), (True, True))}
NORMS = ('rms', 'layer')


class LogGate(Linear):
    """x [B, N, D] -> log σ(linear(x))/τ, at most 0, in the accumulator: bfloat16 cannot tell a gate of 0.998
    from 1."""

    def __call__(self, x: Array) -> Array:
        acc = accumulator(self.dtype)
        kernel, bias = self.kernel[...].astype(acc), self.bias[...].astype(acc)
        return jax.nn.log_sigmoid(jnp.tensordot(x.astype(acc), kernel, 1) + bias) / TEMPERATURE


class GatedLinearAttention(Mixer):
    """proj(norm(o)·swish(gate(x))), o_t = E^-0.5·q_t·S_t, S_t = diag(α_t)·S_{t-1} + k_tᵀ·v_t.

    Args:
        heads: K. Values have V = width/K channels a head, keys and queries E = expand_k·V (DiG: 32 and 64).
        directions: 'causal' (DiG, one a block), or several within the block, each normed, then summed (paper,
            Table 1): 'bidirectional' forwards and backwards; 'four' also columns before rows. The last line
            of the paper's Algorithm 3 adds its third direction twice; here each counts once.
        value_gate: β of the paper, a gate for each channel of the values. Runs token by token, not in chunks.
        norm: 'rms' (code) or 'layer' (paper; with gain and bias). gate_bias: the paper's.
        chunk: tokens of a chunk; 0 takes the platform's best."""
    leaves = (
        Leaf('q/kernel', ('D', 'K', 'Q'), 'linear', 'q_proj.weight'),
        Leaf('key/kernel', ('D', 'K', 'Q'), 'linear', 'k_proj.weight'),
        Leaf('value/kernel', ('D', 'K', 'V'), 'linear', 'v_proj.weight'),
        Leaf('gate/kernel', ('D', 'K', 'V'), 'linear', 'g_proj.weight'),
        Leaf('decay_in/kernel', ('D', None), 'linear', 'gk_proj.0.weight'),
        *product('decay_out', (None, 'K', 'Q'), 'linear', 'gk_proj.1'),
        Leaf('norm_gain', ('V',), 'copy', 'g_norm_swish_gate.weight'),
        Leaf('proj/kernel', ('K', 'V', 'D'), 'linear_in', 'o_proj.weight'),
        Leaf('gate/bias', ('K', 'V'), 'flat'), Leaf('norm_bias', ('V',), 'copy'),      # of the paper alone
        *product('value_decay', ('D', 'K', 'V')))
    parts = {'q': ('q', None), 'k': ('key', None), 'v': ('value', None), 'o': ('proj', None)}

    @staticmethod
    def state_bytes(mixer, width, grid) -> int:
        """The state of every direction, in float32."""
        channels, size = head_channels(mixer, width)
        ways = len(DIRECTIONS[mixer.get('directions', 'causal')])
        return 4 * ways * channels * int(size * mixer.get('expand_k', 0.5))

    @classmethod
    def read_torch(cls, found, hints, published) -> Blocks:
        """A DiG: the norm of the heads shows the channels of one, q_proj those of all keys."""
        width, values, keys = (found.sizes.get(letters, 0) for letters in ('D', 'V', 'KQ'))
        problems = []
        if not values or width % values:
            problems = [f'the norm of a head has {values} channels (attn.g_norm_swish_gate.weight), which do '
                        f'not divide the width {width}']
        heads = hints.heads or (1 if problems else width // values)
        if not problems and width // heads != values:
            problems = [f'a head has {values} channels, so there are {width // values} heads, not {heads}']
        family = {'family': 'dig', 'skip': 'skip' if found.has('blocks.{i}.skip_linear.weight') else 'none',
                  'local': 'identity' if found.has('blocks.{i}.dw_conv.weight') else 'none'}
        shown = {'expand_k': keys / width} if keys else {}
        return Blocks(cls.defaults() | {'heads': heads} | shown, problems=problems, family=family)

    def __init__(self, width: int, *, heads: int, expand_k: float = 0.5, directions: str = 'causal',
                 value_gate: bool = False, norm: str = 'rms', gate_bias: bool = False, chunk: int = 0,
                 dtype=jnp.float32, rngs: nnx.Rngs):
        v_dim = width // heads
        _check_options(v_dim, expand_k, directions, norm, chunk)
        e_dim = int(v_dim * expand_k)
        self.dtype, self.directions, self.chunk = dtype, directions, chunk

        def init(*args):      # with the gain of all products of this layer
            return 2 ** -2.5 * xavier_uniform(*args)

        def linear(inputs, outputs, bias=False, kind=Linear):
            return kind(inputs, outputs, bias=bias, init=init, dtype=dtype, rngs=rngs)

        self.q, self.key = linear(width, (heads, e_dim)), linear(width, (heads, e_dim))
        self.value, self.gate = linear(width, (heads, v_dim)), linear(width, (heads, v_dim), gate_bias)
        self.decay_in, self.decay_out = linear(width, RANK), linear(RANK, (heads, e_dim), True, LogGate)
        self.value_decay = linear(width, (heads, v_dim), True, LogGate) if value_gate else None
        self.norm_gain = nnx.Param(jnp.ones((v_dim,), jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros((v_dim,), jnp.float32)) if norm == 'layer' else None
        self.proj = linear((heads, v_dim), width)

    @staticmethod
    def row_unit(mixer) -> None:
        """None: each token's state depends on the one before it, so `seq` cannot shard them."""
        return None

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        check_grid(x_BND, grid)
        heads = 'batch', 'tokens', 'heads', None
        inputs = [constrain(linear(x_BND), *heads) for linear in (self.q, self.key, self.value)]
        inputs.append(constrain(self.decay_out(self.decay_in(x_BND)), *heads))
        if self.value_decay is not None:
            inputs.append(constrain(self.value_decay(x_BND), *heads))
        o: Any = sum(_back(self._norm(self._attend(*(_turn(a, grid, *way) for a in inputs))), grid, *way)
                for way in DIRECTIONS[self.directions])
        gate = jax.nn.silu(constrain(self.gate(x_BND), *heads).astype(o.dtype))
        return self.proj((o * gate).astype(self.dtype))

    def _attend(self, q_BNKE: Array, k_BNKE: Array, v_BNKV: Array, g_BNKE: Array,
                h_BNKV: Array | None = None) -> Array:
        """o [B, N, K, V] in the accumulator; each device for its own images and heads."""
        def attend(q, k, v, *gates):
            if len(gates) == 2:
                return recurrent_gla(q, k, v, *gates)[0]
            return chunked_gla(q, k, v, *gates, chunk=self.chunk)[0]

        inputs = (q_BNKE, k_BNKE, v_BNKV, g_BNKE) + (() if h_BNKV is None else (h_BNKV,))
        if jax.sharding.get_abstract_mesh().size > 1:      # sharded heads and images cannot be merged
            spec = partition_spec(q_BNKE.shape, 'batch', None, 'heads', None)
            attend = jax.shard_map(attend, in_specs=(spec,) * len(inputs), out_specs=spec, check_vma=False)
        return attend(*inputs) * q_BNKE.shape[-1] ** -0.5

    def _norm(self, o_BNKV: Array) -> Array:
        gain = self.norm_gain[...].astype(o_BNKV.dtype)
        if self.norm_bias is not None:
            return layer_norm(o_BNKV, EPS)[0] * gain + self.norm_bias[...].astype(o_BNKV.dtype)
        return o_BNKV * jax.lax.rsqrt(jnp.square(o_BNKV).mean(-1, keepdims=True) + EPS) * gain


def _turn(x: Array, grid: tuple[int, int], columns: bool, backwards: bool) -> Array:
    """Tokens [B, N, ...] in another order: columns before rows, then last one first."""
    x = transpose_tokens(x, grid) if columns else x
    return x[:, ::-1] if backwards else x


def _back(x: Array, grid: tuple[int, int], columns: bool, backwards: bool) -> Array:
    x = x[:, ::-1] if backwards else x
    return transpose_tokens(x, grid[::-1]) if columns else x


def transpose_tokens(x: Array, grid: tuple[int, int]) -> Array:
    """Tokens [B, N, ...] of a grid (H, W), rows first -> those of its transpose (W, H), rows first."""
    return x.reshape(x.shape[0], *grid, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)


def _check_options(v_dim: int, expand_k: float, directions: str, norm: str, chunk: int) -> None:
    if not expand_k > 0 or v_dim * expand_k % 1:
        raise UserError(f'mixer.expand_k {shown(expand_k)} times {v_dim} is no whole number of key channels')
    if directions not in DIRECTIONS:
        raise UserError(f'unknown mixer.directions {shown(directions)}; known: {", ".join(DIRECTIONS)}')
    if norm not in NORMS:
        raise UserError(f'unknown mixer.norm {shown(norm)}; known: {", ".join(NORMS)}')
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0 or chunk & (chunk - 1):
        raise UserError(f"mixer.chunk must be a power of two, or 0 for the platform's best, got "
                        f"{shown(chunk)}")
