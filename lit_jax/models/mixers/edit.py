"""EDiT's linear compressed attention (arXiv 2503.16726): convolved queries, a key and value for four tokens.

There is no official code. From the paper: queries are ReLU(Linear(x + c(x))) with c(x) =
Conv1x1(LeakyReLU(GroupNorm(Conv3x3(x)))) and fewer channels in between; keys ReLU(φ(x)) and values φ(x), each
φ a Linear and a depth-wise 3x3 convolution of stride 2; linear attention; an output projection. Decided here:

- half as many channels in between (`ratio`), and one head: with both, the GFLOPs that the DyDi-LiT paper
  gives for its class-conditional EDiT come out to 0.1 %; other head counts are 0.4 to 3.5 % off;
- 32 groups (or their greatest common divisor with the channels), epsilon 1e-5, slope 0.01, biases everywhere,
  zero padding of 1, kernels of convolutions uniform within ±1/sqrt(fan-in) at the start: PyTorch's defaults;
- the normaliser as in LiT: (mean of q·k over the keys) + 1e-6, nothing added to q and k."""
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import Conv, GroupNorm
from lit_jax.models.facts import Leaf, product
from lit_jax.models.layers import Array, Linear, check_grid
from lit_jax.models.mixers.linear import EPS, bytes_of_sums, linear_attention
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.partition import constrain, mesh_axis_size
from lit_jax.models.probe import show
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError


class ConvFusion(nnx.Module):
    """x + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(x)))), ratio·D channels in between: [B, H, W, D] -> same."""

    def __init__(self, width: int, ratio: float, groups: int, *, dtype, rngs: nnx.Rngs):
        hidden = int(width * ratio)
        if not 1 <= hidden:
            raise UserError(f'mixer.ratio {ratio} leaves no channels of {width}')
        self.compress = Conv(width, hidden, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(hidden, math.gcd(hidden, groups), epsilon=1e-5, rngs=rngs)
        self.restore = Conv(hidden, width, 1, padding=(0, 0), dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array) -> Array:
        x_BHWF = constrain(self.compress(x_BHWD), 'batch', 'rows', None, 'hidden')
        hidden_BHWF = jax.nn.leaky_relu(self.norm(x_BHWF), 0.01)
        return x_BHWD + constrain(self.restore(hidden_BHWF), 'batch', 'rows', None, None)


class SpatialCompressor(nnx.Module):
    """Linear, depth-wise 3x3 convolution of stride 2: [B, H, W, D] -> [B, ceil(H/2), ceil(W/2), K, E]."""

    def __init__(self, width: int, head: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        def uniform(shape):      # ±1/sqrt(fan-in): each channel sees nine numbers
            return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -1 / 3, 1 / 3))

        self.linear = Linear(width, head, dtype=dtype, rngs=rngs)
        self.kernel, self.bias = uniform((3, 3, *head)), uniform(head)

    def __call__(self, x_BHWD: Array) -> Array:
        x = constrain(self.linear(x_BHWD), 'batch', 'rows', None, 'heads', None)
        acc = accumulator(x.dtype)
        y = halve(x.astype(acc), self.kernel[...].astype(acc)) + self.bias[...].astype(acc)
        return constrain(y.astype(x.dtype), 'batch', 'rows', None, 'heads', None)


def halve(x_BHWKE: Array, kernel_33KE: Array) -> Array:
    """Each channel of each head with its own 3x3 kernel, stride 2, one row and column of zeros around.

    On CPU as nine shifted slices: XLA's grouped convolution takes 30 times as long. Sharded rows use the
    convolution everywhere: it partitions into one exchange of rows."""
    if mesh_axis_size('seq') > 1:
        return _convolved(x_BHWKE, kernel_33KE)
    return jax.lax.platform_dependent(x_BHWKE, kernel_33KE, cpu=_shifted, default=_convolved)


def _shifted(x: Array, kernel: Array) -> Array:
    rows, columns = (-(-side // 2) for side in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    total: Any = sum(padded[:, i:i + 2 * rows - 1:2, j:j + 2 * columns - 1:2] * kernel[i, j]
                     for i in range(3) for j in range(3))
    return total


def _convolved(x: Array, kernel: Array) -> Array:
    b, rows, columns, *head = x.shape
    flat = math.prod(head)
    y = jax.lax.conv_general_dilated(x.reshape(b, rows, columns, flat), kernel.reshape(3, 3, 1, flat), (2, 2),
                                     ((1, 1), (1, 1)), feature_group_count=flat,
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return y.reshape(*y.shape[:3], *head)


class EditAttention(Mixer):
    """Linear attention of convolved queries over compressed keys and values: [B, N, D] -> [B, N, D]. An odd
    side of the grid gives (side + 1)/2 rows of keys. heads: 1 by the DyDi-LiT paper's counts. ratio: channels
    between the two convolutions of the queries, over the width. groups: of their norm, see above."""
    leaves = (*product('fusion/compress', (3, 3, 'D', 'F'), 'conv'),
              Leaf('fusion/norm/(gain|bias)', ('F',), 'flat'),
              *product('fusion/restore', (1, 1, 'F', 'D'), 'conv'),
              *product('q', ('D', 'K', 'E')), *product('[kv]/linear', ('D', 'K', 'E')),
              *product('[kv]', (3, 3, 'K', 'E'), 'depthwise'), *product('proj', ('K', 'E', 'D'), 'linear_in'))
    parts = {'q': ('q', None), 'k': ('k/linear', None), 'v': ('v/linear', None), 'o': ('proj', None)}
    state_bytes = staticmethod(bytes_of_sums)
    usual_heads = 1

    @staticmethod
    def keys(mixer, grid) -> int:
        return math.prod(-(-side // 2) for side in grid)

    def __init__(self, width: int, *, heads: int, ratio: float = 0.5, groups: int = 32, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        head = (heads, width // heads)
        self.dtype = dtype
        self.fusion = ConvFusion(width, ratio, groups, dtype=dtype, rngs=rngs)
        self.q = Linear(width, head, dtype=dtype, rngs=rngs)
        self.k = SpatialCompressor(width, head, dtype=dtype, rngs=rngs)
        self.v = SpatialCompressor(width, head, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)

    @staticmethod
    def row_unit(mixer) -> int:
        """Two: they become one row of keys."""
        return 2

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        b, n, d = x_BND.shape
        check_grid(x_BND, grid)
        x_BHWD = constrain(x_BND.reshape(b, *grid, d), 'batch', 'rows', None, None)
        fused_BND = self.fusion(x_BHWD).reshape(b, n, d)
        q_BNKE = constrain(self.q(fused_BND), 'batch', 'tokens', 'heads', None)
        k_BMKE, v_BMKE = (y.reshape(b, -1, *y.shape[3:]) for y in (part(x_BHWD) for part in (self.k, self.v)))
        acc = accumulator(self.dtype)
        q_BNKE, k_BMKE = (jax.nn.relu(a).astype(acc) for a in (q_BNKE, k_BMKE))
        return self.proj(compressed_attention(q_BNKE, k_BMKE, v_BMKE))


def compressed_attention(q_BNKE: Array, k_BMKE: Array, v_BMKE: Array) -> Array:
    """`linear_attention`, by the map of queries and keys where that is less work (few keys, wide heads)."""
    n, m, e = q_BNKE.shape[1], k_BMKE.shape[1], q_BNKE.shape[3]
    if 2 * n * m >= (n + m) * (e + 1):
        return linear_attention(q_BNKE, k_BMKE, v_BMKE)
    show('linear/query', q_BNKE)
    show('linear/key', k_BMKE)
    acc, dtype = q_BNKE.dtype, v_BMKE.dtype
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BNKE, k_BMKE, v_BMKE))
    map_BKNM = jnp.einsum('bkne,bkme->bknm', q.astype(dtype), k.astype(dtype), preferred_element_type=acc) / m
    o_BKNE = jnp.einsum('bknm,bkme->bkne', map_BKNM.astype(dtype), v, preferred_element_type=acc)
    return jnp.swapaxes(o_BKNE / (map_BKNM.sum(-1, keepdims=True) + EPS), 1, 2)
