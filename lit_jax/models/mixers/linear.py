"""LiT's linear attention (arXiv 2501.12976, Algorithm 1) and the variants of its ablations. Cost grows with
N·E² a head instead of N²: keys and values are summed into one E x E state first."""
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.facts import Blocks, Leaf, head_problems, product
from lit_jax.models.layers import Array, Linear, axes_stay_apart, check_grid
from lit_jax.models.mixers.depthwise import depthwise_conv, depthwise_tokens
from lit_jax.models.mixers.mixer import Mixer, head_channels
from lit_jax.models.partition import constrain, mesh_axis_size
from lit_jax.models.probe import show
from lit_jax.models.rotary import check_rotary, rotate
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

EPS = 1e-6     # added to φ(q) and φ(k), and again to the normaliser q·mean(k)
EXACT_TOKENS = 4096      # with more, sums over tokens are not rounded on their way into the next product
ACTIVATIONS = {'relu': jax.nn.relu, 'gelu': lambda x: jax.nn.gelu(x, approximate=False)}


class DepthwiseConv(nnx.Module):
    """The k x k convolution on the values: one kernel per channel of a head, shared by all heads."""

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        def uniform(shape):       # PyTorch's default for a convolution with one input channel a group
            return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -1 / size, 1 / size))

        self.kernel, self.bias = uniform((size, size, 1, channels)), uniform((channels,))

    def __call__(self, x_BHWKE: Array) -> Array:
        return depthwise_conv(x_BHWKE, self.kernel[...], self.bias[...], dtype=accumulator(x_BHWKE.dtype))


def bytes_of_sums(mixer, width: int, grid) -> int:
    """One E x E sum and the E numbers of its normaliser a head, in float32."""
    channels, size = head_channels(mixer, width)
    return 4 * channels * (size + 1)


class LinearAttention(Mixer):
    """o = φ(q)·(φ(k)ᵀv / N) / (φ(q)·mean φ(k)) + dwc(v), then proj: [B, N, D] -> [B, N, D].

    Shows 'linear/convolution', the kernel of dwc, and what `linear_attention` shows.

    Args:
        heads: E = width / heads; few wide heads suit linear attention.
        qkv_bias: bias on q and kv. Algorithm 1 has none.
        dwc_kernel: size of the depth-wise convolution on the values, odd; 0 leaves it out.
        activation: φ, 'relu' or 'gelu' (the exact one).
        focus_power: p of the focused function (arXiv 2308.00442; 3 there); 0 leaves it out.
        focus_scale: with focus_power, divides φ(q) and φ(k) by softplus of a learned vector (FLatten).
        key_grid: (H, W) of a learned table added to k before φ (FLatten); None (LiT) leaves it out.
        rope: φ(q) and φ(k) are turned by their positions in the numerator (`lit_jax.models.rotary`). The
            normaliser has them unturned, as in RoFormer: only so is it a positive sum of weights."""
    leaves = (*product('q', ('D', 'K', 'E'), 'linear', 'q'),
              *product('kv', ('D', 2, 'K', 'E'), 'linear', 'kv'),
              *product('proj', ('K', 'E', 'D'), 'linear_in', 'proj'),
              *product('dwc', ('k', 'k', 1, 'E'), 'depthwise', 'dwc'),      # shared by the heads
              Leaf('focus_scale', (None, None), 'flat'), Leaf('key_table', (None, None, None), 'linear'))
    parts = {'q': ('q', None), 'k': ('kv', 0), 'v': ('kv', 1), 'o': ('proj', None)}
    state_bytes = staticmethod(bytes_of_sums)

    @classmethod
    def suggest(cls, teacher) -> dict:
        """LiT's few wide heads (its supplement, table 1; §4.2 for text), a kernel that fits the grid, and the
        positions of the teacher's attention."""
        width, text = teacher['width'], 'caption_channels' in teacher
        heads = [n for n in (1, 2, 3, 4) if width % n == 0 and (n <= 2 or width >= 256 * n and not text)]
        small = min(teacher['input_size']) < 5 * teacher['patch']
        return {'heads': max(heads), 'dwc_kernel': 3 if small else 5,
                'rope': bool(teacher['mixer'].get('rope', False))}

    @classmethod
    def read_torch(cls, found, hints, published) -> Blocks:
        width, head_dim = found.sizes['D'], found.sizes.get('E')
        heads = hints.heads or (width // head_dim if head_dim and width % head_dim == 0 else None)
        problems = head_problems(heads, width)
        if not problems and head_dim and width // heads != head_dim:
            problems = [f'the depth-wise convolution has {head_dim} channels, so the model has '
                        f'{width / head_dim:g} heads, not {heads}']
        return Blocks({'heads': heads, 'qkv_bias': found.holds('q/bias') or found.holds('kv/bias'),
                       'dwc_kernel': found.sizes.get('k', 0), 'activation': hints.activation or 'relu',
                       'focus_power': hints.focus_power or 0}, problems=problems)

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = False, dwc_kernel: int = 5,
                 activation: str = 'relu', focus_power: int = 0, focus_scale: bool = False,
                 key_grid: tuple[int, int] | None = None, rope: bool = False, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        if rope:
            check_rotary(width, heads)
        _check_options(dwc_kernel, activation, focus_power, focus_scale)
        head = (heads, width // heads)
        self.dtype, self.activation, self.focus_power, self.rope = dtype, activation, focus_power, rope
        self.q = Linear(width, head, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.kv = Linear(width, (2, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)
        self.dwc = DepthwiseConv(width // heads, dwc_kernel, rngs=rngs) if dwc_kernel else None
        self.focus_scale = nnx.Param(jnp.zeros(head, jnp.float32)) if focus_scale else None
        self.key_table = nnx.Param(jnp.zeros((math.prod(key_grid), *head), jnp.float32)) if key_grid else None

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        check_grid(x_BND, grid)
        if self.dwc is not None:
            show('linear/convolution', self.dwc.kernel[...])
        if axes_stay_apart():
            return self._in_heads(x_BND, grid)
        q_BND, (k_BND, v_BND) = self.q.flat(x_BND), jnp.split(self.kv.flat(x_BND), 2, -1)
        heads = self.q.out_shape
        plain = self.activation == 'relu' and not self.focus_power and self.key_table is None
        if plain and not self.rope:
            show('linear/query', lambda: self.features(q_BND.reshape(*x_BND.shape[:2], *heads)))
            show('linear/key', lambda: self.features(k_BND.reshape(*x_BND.shape[:2], *heads)))
            o_BND = relu_attention(q_BND, k_BND, v_BND, heads[0])
        else:
            q, k, v = (a.reshape(*x_BND.shape[:2], *heads) for a in (q_BND, k_BND, v_BND))
            o_BND = linear_attention(self.features(q), self.features(k, self.key_table), v,
                                     grid=grid if self.rope else None)
            o_BND = o_BND.reshape(x_BND.shape)
        if self.dwc is not None:
            o_BND = o_BND + depthwise_tokens(v_BND, grid, self.dwc.kernel[...], self.dwc.bias[...])
        return self.proj.flat(o_BND.reshape(*x_BND.shape[:2], *heads))

    def _in_heads(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """With heads as an axis everywhere, which a mesh shards."""
        q_BNKE = constrain(self.q(x_BND), 'batch', 'tokens', 'heads', None)
        kv = constrain(self.kv(x_BND), 'batch', 'tokens', None, 'heads', None)
        k_BNKE, v_BNKE = kv[:, :, 0], kv[:, :, 1]
        o = linear_attention(self.features(q_BNKE), self.features(k_BNKE, self.key_table), v_BNKE,
                             grid=grid if self.rope else None)
        if self.dwc is not None:
            v_BHWKE = v_BNKE.reshape(v_BNKE.shape[0], *grid, *v_BNKE.shape[2:])
            o = o + self.dwc(v_BHWKE).reshape(o.shape)
        return self.proj(o)

    def features(self, x_BNKE: Array, table: nnx.Param | None = None) -> Array:
        """φ(x) + 1e-6 of queries or keys in the accumulator, focused if the options say so."""
        x = x_BNKE.astype(accumulator(self.dtype))
        if table is not None:
            x = x + table[...].astype(x.dtype)
        x = ACTIVATIONS[self.activation](x) + EPS
        if self.focus_scale is not None:
            x = x / jax.nn.softplus(self.focus_scale[...].astype(x.dtype))
        return focus(x, self.focus_power) if self.focus_power else x


@jax.named_scope('linear_core')
def linear_attention(q_BNKE: Array, k_BNKE: Array, v_BNKE: Array, eps: float = EPS, shortest: bool = False,
                     grid: tuple[int, int] | None = None) -> Array:
    """q·(kᵀv/N) / (q·mean(k) + eps) for each head; q, k (after φ) and the result in the accumulator. Means,
    not sums, over tokens keep every factor of order one at any N, and make `eps` relative to the mean. Shows
    'linear/query' and 'linear/key', its inputs. `shortest`: see `weighted_sum`. grid: of the tokens, to turn
    q and k by their positions in the numerator."""
    show('linear/query', q_BNKE)
    show('linear/key', k_BNKE)
    # Heads first, once for all products: XLA:CPU would transpose the operands of each product.
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BNKE, k_BNKE, v_BNKE))
    turned_q, turned_k = (q, k) if grid is None else (
        jnp.swapaxes(rotate(a, grid), 1, 2) for a in (q_BNKE, k_BNKE))
    o = weighted_sum(turned_q, turned_k, v, shortest=shortest) / (total_weight(q, k) + eps)[..., None]
    return jnp.swapaxes(o, 1, 2)


# One head, or all of them: arrays [..., N, E]. Of the tokens only q, k and v are kept for the gradient:
# features are computed again.


def _relu_forward(q, k, v):
    acc = accumulator(q.dtype)
    wide_q, wide_k = (jax.nn.relu(a).astype(acc) + EPS for a in (q, k))
    state = jnp.einsum('...ne,...nf->...ef', wide_k.astype(v.dtype), v, preferred_element_type=acc)
    state, mean = state / k.shape[-2], wide_k.mean(-2)
    if not _is_exact(k.shape[-2]):
        state = state.astype(v.dtype)      # as its products take it; half to keep
    o = _product('...ne,...ef->...nf', wide_q.astype(v.dtype), state, acc) / _total(wide_q, mean)
    return o, state, mean


def _is_exact(tokens) -> bool:
    """Also where their number is not known: in programs that are exported for any size."""
    return not isinstance(tokens, int) or tokens > EXACT_TOKENS


def _total(q, mean):
    return jnp.einsum('...ne,...e->...n', q, mean)[..., None] + EPS


def _relu_backward(q, k, v, state, mean, g):
    acc, dtype, n = mean.dtype, v.dtype, k.shape[-2]
    wide_q, wide_k = (jax.nn.relu(a).astype(acc) + EPS for a in (q, k))
    total = _total(wide_q, mean)
    g = (g / total).astype(dtype)
    g_q = _product('...nf,...ef->...ne', g, state, acc)
    g_total = -(wide_q * g_q).sum(-1, keepdims=True) / total
    g_state = jnp.einsum('...ne,...nf->...ef', wide_q.astype(dtype), g, preferred_element_type=acc) / n
    g_mean = (wide_q * g_total).sum(-2, keepdims=True)
    g_k = _product('...nf,...ef->...ne', v, g_state, acc) + g_mean / n
    g_v = _product('...ne,...ef->...nf', wide_k.astype(dtype), g_state, acc)
    g_q = g_q + g_total * mean[..., None, :]
    return jnp.where(q > 0, g_q, 0).astype(dtype), jnp.where(k > 0, g_k, 0).astype(dtype), g_v.astype(dtype)


def _over_heads(function, heads: int, results: int, tokens, states=()):
    """function(*tokens [..., N, E], *states [..., E, (E)]) for arrays [B, N, D] and [B, K, E, (E)]; its first
    `results` are of tokens, the others states."""
    (b, n, width), size = tokens[0].shape, tokens[0].shape[-1] // heads

    def at_once(tokens, states):
        # Heads first, once for all products: XLA:CPU would transpose the operands of each product.
        found = function(*(jnp.swapaxes(a.reshape(b, n, heads, size), 1, 2) for a in tokens), *states)
        return (*(jnp.swapaxes(a, 1, 2).reshape(b, n, width) for a in found[:results]), *found[results:])

    def one_by_one(tokens, states):
        # As an axis of arrays, heads of 288 channels are padded and turned round by TPUs.
        found = zip(*(function(*(a[..., head * size:(head + 1) * size] for a in tokens),
                               *(a[:, head] for a in states)) for head in range(heads)), strict=True)
        return tuple(jnp.concatenate(parts, -1) if i < results else jnp.stack(parts, 1)
                     for i, parts in enumerate(found))

    return jax.lax.platform_dependent(tokens, states, tpu=one_by_one, default=at_once)


def _rule_forward(heads, q_BND, k_BND, v_BND):
    o, *states = _over_heads(_relu_forward, heads, 1, (q_BND, k_BND, v_BND))
    return o, (q_BND, k_BND, v_BND, *states)


def _rule_tangent(heads, residuals, tangents):
    def plain(*tokens):
        q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in tokens)
        q, k = (jax.nn.relu(a).astype(accumulator(a.dtype)) + EPS for a in (q, k))
        return linear_attention(q, k, v).reshape(tokens[0].shape)

    return jax.jvp(plain, residuals[:3], tangents)[1]


def _rule_backward(heads, residuals, g_BND):
    q, k, v, *states = residuals

    def backward(q, k, v, g, *states):
        return _relu_backward(q, k, v, *states, g)

    return _over_heads(backward, heads, 3, (q, k, v, g_BND), states)


_relu_attention = with_derivatives(_rule_forward, _rule_tangent, _rule_backward, static=1)


@jax.named_scope('linear_core')
def relu_attention(q_BND: Array, k_BND: Array, v_BND: Array, heads: int) -> Array:
    """`linear_attention` of φ(q) and φ(k), φ(x) = relu(x) + 1e-6, from arrays in the compute dtype whose
    heads lie one behind the other: [B, N, D] in the accumulator."""
    return _relu_attention(heads, q_BND, k_BND, v_BND)


def weighted_sum(q_BKNE: Array, k_BKNE: Array, v_BKNE: Array, *, shortest: bool = False) -> Array:
    """q·(kᵀv/N), [B, K, N, E]: products in the dtype of v, sums in that of q and k, which it returns.
    `shortest` takes (q·kᵀ/N)·v where there are fewer tokens than channels (256 tokens and one head of 384,
    say; the GFLOPs of the DyDi-LiT paper are counted so), unless the tokens are sharded."""
    einsum, dtype = functools.partial(jnp.einsum, preferred_element_type=q_BKNE.dtype), v_BKNE.dtype
    if shortest and k_BKNE.shape[2] < k_BKNE.shape[3] and mesh_axis_size('seq') == 1:
        map_BKNN = einsum('bkne,bkme->bknm', q_BKNE.astype(dtype), k_BKNE.astype(dtype)) / k_BKNE.shape[2]
        return einsum('bknm,bkme->bkne', map_BKNN.astype(dtype), v_BKNE)
    if dtype != q_BKNE.dtype and _is_exact(k_BKNE.shape[2]):
        return _exact_sum(q_BKNE, k_BKNE, v_BKNE)
    state_BKEE = einsum('bkne,bknf->bkef', k_BKNE.astype(dtype), v_BKNE) / k_BKNE.shape[2]
    return einsum('bkne,bkef->bknf', q_BKNE.astype(dtype), state_BKEE.astype(dtype))


def _exact_sum_forward(q, k, v):
    einsum = functools.partial(jnp.einsum, preferred_element_type=q.dtype)
    state = einsum('bkne,bknf->bkef', k.astype(v.dtype), v) / k.shape[2]
    return _wide_product('bkne,bkef->bknf', q.astype(v.dtype), state), (q, k, v, state)


def _exact_sum_tangent(residuals, tangents):
    (q, k, v, state), (dq, dk, dv) = residuals, tangents
    einsum = functools.partial(jnp.einsum, preferred_element_type=q.dtype)
    dstate = (einsum('bkne,bknf->bkef', dk.astype(v.dtype), v)
              + einsum('bkne,bknf->bkef', k.astype(v.dtype), dv)) / k.shape[2]
    return (_wide_product('bkne,bkef->bknf', dq.astype(v.dtype), state)
            + _wide_product('bkne,bkef->bknf', q.astype(v.dtype), dstate))


def _exact_sum_backward(residuals, g):
    q, k, v, state = residuals
    g_state = jnp.einsum('bkne,bknf->bkef', q.astype(v.dtype), g.astype(v.dtype),
                         preferred_element_type=q.dtype) / k.shape[2]
    return (_wide_product('bknf,bkef->bkne', g.astype(v.dtype), state),
            _wide_product('bknf,bkef->bkne', v, g_state),
            _wide_product('bkne,bkef->bknf', k.astype(v.dtype), g_state).astype(v.dtype))


def _product(axes: str, x: Array, state: Array, acc) -> Array:
    """Of x [..., N, ·] and a state, in the accumulator."""
    if x.dtype != state.dtype and _is_exact(x.shape[-2]):
        return _wide_product(axes, x, state)
    return jnp.einsum(axes, x, state.astype(x.dtype), preferred_element_type=acc)


def _wide_product(axes: str, x: Array, state: Array) -> Array:
    """Of x and a state in the accumulator, as two products in the dtype of x: the rounding error of a state
    is the same for all tokens, so it does not average out in the gradients of weights."""
    bits = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(state, bits.nexp, bits.nmant)      # a cast back and forth may be left out
    first, second = (jnp.einsum(axes, x, part.astype(x.dtype), preferred_element_type=state.dtype)
                     for part in (high, state - high))
    return first + second


_exact_sum = with_derivatives(_exact_sum_forward, _exact_sum_tangent, _exact_sum_backward)


def total_weight(q_BKNE: Array, k_BKNE: Array) -> Array:
    """q·mean(k), [B, K, N]: the sum of a query's weights."""
    return jnp.einsum('bkne,bke->bkn', q_BKNE, k_BKNE.mean(2))


def focus(x_BNKE: Array, power: int) -> Array:
    """x^p with the norm of x, over all heads: sharpens the direction, keeps the length (FLatten eq. 5)."""
    def norm(x):
        return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))

    # The direction does not depend on the size of x; undivided, 1e-6 cubed and squared underflows in float32.
    peak = jax.lax.stop_gradient(jnp.abs(x_BNKE).max((-2, -1), keepdims=True))
    powered = (x_BNKE / peak) ** power
    return powered / norm(powered) * norm(x_BNKE)


def _check_options(dwc_kernel: int, activation: str, focus_power: int, focus_scale: bool) -> None:
    if isinstance(dwc_kernel, bool) or not isinstance(dwc_kernel, int) or dwc_kernel and (
            dwc_kernel < 0 or dwc_kernel % 2 == 0):
        raise UserError(f'dwc_kernel must be odd (3, 5, ...) or 0 for no convolution, got '
                        f'{shown(dwc_kernel)}')
    if activation not in ACTIVATIONS:
        raise UserError(f'unknown activation {shown(activation)}; known: {", ".join(ACTIVATIONS)}')
    if isinstance(focus_power, bool) or not isinstance(focus_power, int) or focus_power < 0:
        raise UserError(f'focus_power must be a positive integer, or 0 for no focusing, got '
                        f'{shown(focus_power)}')
    if focus_scale and not focus_power:
        raise UserError('focus_scale belongs to the focused function; set focus_power (3 in the paper) too')
