"""Parts of every backbone: projections, norms, embedders, patches, and the stack of blocks.

Array names end with their shape, one letter an axis: B batch, H W spatial, N tokens, C latent channels, D
width, F mlp width, K heads, E head dim, S depth of the stack. Images are NHWC, tokens are rows first.

Parameters are float32. `dtype` is the compute dtype of a module: bfloat16, float32, or float64 in tests.
Norms, timestep features and sums over tokens use `accumulator(dtype)`."""
import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.models.derivatives import with_derivatives
from lit_jax.models.partition import constrain, mesh_axis_size
from lit_jax.models.probe import show, show_all, watched, watching
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

Array = jax.Array
Init = Callable[[Array, Sequence[int], Sequence[int]], Array]


# Initialisers: (key, in_shape, out_shape) -> float32 array of shape in_shape + out_shape.


def xavier_uniform(key: Array, in_shape: Sequence[int], out_shape: Sequence[int]) -> Array:
    """Xavier-uniform over the flattened matrix, as DiT has it everywhere; a fused qkv has fan_out 3D."""
    bound = math.sqrt(6.0 / (math.prod(in_shape) + math.prod(out_shape)))
    return jax.random.uniform(key, (*in_shape, *out_shape), jnp.float32, -bound, bound)


def normal_init(std: float) -> Init:
    """Normal with standard deviation `std` (DiT: 0.02 for the timestep and label embedders)."""
    return lambda key, i, o: std * jax.random.normal(key, (*i, *o), jnp.float32)


def zeros_init(key: Array, in_shape: Sequence[int], out_shape: Sequence[int]) -> Array:
    """All zeros (adaLN-Zero: modulation and output layers)."""
    return jnp.zeros((*in_shape, *out_shape), jnp.float32)


_wide_gradients: contextvars.ContextVar[bool] = contextvars.ContextVar('wide_gradients', default=False)


@contextlib.contextmanager
def wide_gradients(on: bool = True):
    """Inside, gradients of kernels stay in the accumulator: devices add theirs up in float32. Otherwise they
    have the compute dtype until they reach the float32 kernel."""
    token = _wide_gradients.set(on)
    try:
        yield
    finally:
        _wide_gradients.reset(token)


def _matmul(x: Array, kernel: Array) -> Array:
    """x [..., in] · kernel [in, out]. In float32 over one axis of rows: with more of them XLA:CPU's gradient
    of the kernel takes 2.7 times as long. In bfloat16, of accelerators, with the axes of x, in which it is
    kept for the gradient: a TPU's loop over layers copies it once more in others."""
    return x @ kernel if x.dtype.itemsize < 4 else row_matmul(x, kernel)


def row_matmul(x: Array, kernel: Array) -> Array:
    """x [..., in] · kernel [in, out], as a product of two matrices."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def kernel_gradient(x: Array, g: Array, kernel: Array) -> Array:
    """Of the kernel in `row_matmul`, from the cotangent g of the product; summed in the accumulator."""
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return jnp.einsum('mi,mo->io', *rows, preferred_element_type=accumulator(x.dtype)).astype(kernel.dtype)


def _wide_forward(x, kernel):
    return row_matmul(x, kernel.astype(x.dtype)), (x, kernel)


def _wide_tangent(residuals, tangents):
    (x, kernel), (dx, dkernel) = residuals, tangents
    return row_matmul(dx, kernel.astype(x.dtype)) + row_matmul(x, dkernel.astype(x.dtype))


def _wide_backward(residuals, g):
    x, kernel = residuals
    return row_matmul(g, kernel.astype(x.dtype).T), kernel_gradient(x, g, kernel)


_wide_matmul = with_derivatives(_wide_forward, _wide_tangent, _wide_backward)


def _gather(kernel: Array) -> Array:
    return constrain(kernel, *[None] * kernel.ndim)


# The gradient is not gathered: it stays as the compiler likes it, and ends sharded as the kernel is.
_gathered = with_derivatives(lambda kernel: (_gather(kernel), jnp.zeros(())),
                             lambda _, tangents: _gather(tangents[0]), lambda _, cotangent: (cotangent,))


def _whole(kernel: Array) -> Array:
    """A kernel that fsdp shards, gathered before its product: XLA:TPU would cut the product into as many as
    there are devices, which takes several times as long."""
    return kernel if axes_stay_apart() or mesh_axis_size('fsdp') == 1 else _gathered(kernel)


class Linear(nnx.Module):
    """A matrix product over the last axes of x, with kernel `in_shape + out_shape` and bias `out_shape`.
    Projections that are split afterwards (qkv, modulation) have their parts and heads as axes of the kernel,
    so that sharding heads or width never splits a part. `apart` keeps them as axes in products of 16 bit,
    too: where parts are whole rows of a TPU's lanes, merging them would turn the kernel and its optimizer's
    state round."""

    def __init__(self, in_shape: int | Sequence[int], out_shape: int | Sequence[int], *, bias: bool = True,
                 apart: bool = False, init: Init = xavier_uniform, dtype=jnp.float32, rngs: nnx.Rngs):
        in_shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
        out_shape = (out_shape,) if isinstance(out_shape, int) else tuple(out_shape)
        self.in_shape, self.out_shape = in_shape, out_shape
        self.dtype, self.apart = dtype, apart and jnp.dtype(dtype).itemsize < 4
        self.kernel = nnx.Param(init(rngs.params(), in_shape, out_shape))
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_shape, jnp.float32))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        """x [..., *in_shape] -> [..., *out_shape] in `dtype`."""
        lead = x.shape[:x.ndim - len(self.in_shape)]
        if self._stays_apart():
            contract = tuple(range(len(lead), x.ndim)), tuple(range(len(self.in_shape)))
            y = jax.lax.dot_general(x.astype(self.dtype), _whole(self.kernel[...].astype(self.dtype)),
                                    (contract, ((), ())))
            return self._add_bias(y, self.out_shape)
        return self.flat(x).reshape(*lead, *self.out_shape)

    def flat(self, x: Array, product: Callable | None = None) -> Array:
        """x [..., *in_shape] -> [..., the axes of out_shape as one]: TPUs pad axes of heads and turn them
        round. product: (x [..., in], kernel [in, out]) -> [..., out] in its place."""
        lead, size = x.shape[:x.ndim - len(self.in_shape)], math.prod(self.in_shape)
        product = product or (_wide_matmul if _wide_gradients.get() else _matmul)
        y = product(x.astype(self.dtype).reshape(*lead, size), _whole(self._matrix()))
        return self._add_bias(y, (math.prod(self.out_shape),))

    def _matrix(self, layers: tuple[int, ...] = ()) -> Array:
        kernel = self.kernel[...] if _wide_gradients.get() else self.kernel[...].astype(self.dtype)
        return kernel.reshape(*layers, math.prod(self.in_shape), math.prod(self.out_shape))

    def _add_bias(self, y: Array, shape: tuple[int, ...]) -> Array:
        if not self.has_bias:
            return y
        # Spread before it is rounded: so its gradient is summed over tokens in float32.
        return y + jnp.broadcast_to(self.bias[...].reshape(shape), y.shape).astype(self.dtype)

    def make_ready(self) -> None:
        """Casts and flattens the kernels of a stack of layers once: what a loop over layers does to its
        weights, the compiled program keeps a second copy of for the gradient."""
        kernel = self.kernel[...]
        self.kernel = nnx.Param(kernel.astype(self.dtype) if self._stays_apart()
                                else self._matrix(kernel.shape[:1]))

    def _stays_apart(self) -> bool:
        return axes_stay_apart() or (self.apart and not _wide_gradients.get())


def axes_stay_apart() -> bool:
    """Whether merging axes of arrays might merge a sharded one with another, which would gather it: heads,
    and rows of tokens."""
    return mesh_axis_size('tensor') > 1 or mesh_axis_size('seq') > 1


def layer_norm(x: Array, eps: float = 1e-6) -> tuple[Array, Array]:
    """LayerNorm over the last axis without gain or bias: (normed, 1/standard deviation), in x's dtype."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _sum_tokens(x_BND: Array) -> Array:
    """Σ over tokens; on CPU as a product with ones, since its fused multiply-and-sum over rows is 30 times
    slower. Elsewhere such a product in float32 costs more than the sum, which is fused."""
    def product(x):
        return jnp.einsum('n,bnd->bd', jnp.ones(x.shape[1], x.dtype), x, precision='highest')

    return jax.lax.platform_dependent(x_BND, cpu=product, default=lambda x: x.sum(1))


def _row_products(a_BND: Array, b_BD: Array) -> Array:
    """Σ over channels of a·b, [B, N, 1]; by platform as `_sum_tokens`."""
    def product(a, b):
        return jnp.einsum('bnd,bd->bn', a, b, precision='highest')[..., None]

    return jax.lax.platform_dependent(a_BND, b_BD, cpu=product,
                                      default=lambda a, b: (a * b[:, None]).sum(-1, keepdims=True))


def _modulate_forward(x_BND, shift_BD, scale_BD):
    acc = accumulator(x_BND.dtype)
    x, shift, gain = x_BND.astype(acc), shift_BD.astype(acc), 1 + scale_BD.astype(acc)
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6)
    y = ((x - mean) * inverse * gain[:, None] + shift[:, None]).astype(x_BND.dtype)
    return y, (x_BND, mean, inverse, shift_BD, scale_BD)      # x as it is: half of what is normed


def _modulate_backward(residuals, g_BND):
    x_BND, mean, inverse, shift_BD, scale_BD = residuals
    acc = inverse.dtype
    g, normed, gain = g_BND.astype(acc), (x_BND.astype(acc) - mean) * inverse, 1 + scale_BD.astype(acc)
    product = g * normed
    centre, slope = (_row_products(a, gain) / a.shape[-1] for a in (g, product))
    dx = inverse * (g * gain[:, None] - centre - normed * slope)
    return (dx.astype(x_BND.dtype), _sum_tokens(g).astype(shift_BD.dtype),
            _sum_tokens(product).astype(scale_BD.dtype))


def _modulate_tangent(residuals, tangents):
    x_BND, mean, inverse, _, scale_BD = residuals
    dx, dshift_BD, dscale_BD = (t.astype(inverse.dtype) for t in tangents)
    normed = (x_BND.astype(inverse.dtype) - mean) * inverse
    slope = (dx * normed).mean(-1, keepdims=True)
    dnormed = inverse * (dx - dx.mean(-1, keepdims=True) - normed * slope)
    dy = dnormed * (1 + scale_BD)[:, None] + normed * dscale_BD[:, None] + dshift_BD[:, None]
    return dy.astype(x_BND.dtype)


_modulate = with_derivatives(_modulate_forward, _modulate_tangent, _modulate_backward)


@jax.named_scope('adaln')
def modulate(x_BND: Array, shift_BD: Array, scale_BD: Array) -> Array:
    """LN(x)·(1 + scale) + shift, the adaLN of DiT: computed in the accumulator, returned in x's dtype.

    The derivative is written out: on CPU the automatic one sums rows longer than a projection takes."""
    return _modulate(x_BND, shift_BD, scale_BD)


def _gate_forward(h_BND, gate_BD):
    return h_BND * gate_BD[:, None], (h_BND, gate_BD)


def _gate_tangent(residuals, tangents):
    (h_BND, gate_BD), (dh_BND, dgate_BD) = residuals, tangents
    return dh_BND * gate_BD[:, None] + h_BND * dgate_BD[:, None]


def _gate_backward(residuals, g_BND):
    h_BND, gate_BD = residuals
    acc = accumulator(h_BND.dtype)
    total = _sum_tokens(h_BND.astype(acc) * g_BND.astype(acc))
    return g_BND * gate_BD[:, None], total.astype(gate_BD.dtype)


_gate = with_derivatives(_gate_forward, _gate_tangent, _gate_backward)


@jax.named_scope('adaln')
def gate(h_BND: Array, gate_BD: Array) -> Array:
    """gate·h for every token; the gradient of the gate is summed over tokens in the accumulator."""
    return _gate(h_BND, gate_BD)


def rms_norm(x: Array, gain: Array, eps: float = 1e-6) -> Array:
    """RMSNorm over the last axis with a gain; computed in the accumulator, returned in x's dtype."""
    y = x.astype(accumulator(x.dtype))
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * gain.astype(y.dtype)).astype(x.dtype)


class RmsNorm(nnx.Module):
    """`rms_norm` with a learned gain [channels]."""

    def __init__(self, channels: int):
        self.gain = nnx.Param(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.gain[...])


class HeadNorm(nnx.Module):
    """LayerNorm over the channels of a head, with gain and bias and epsilon 1e-5 (PyTorch's default)."""

    def __init__(self, channels: int):
        self.gain = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Array) -> Array:
        acc = accumulator(x.dtype)
        normed, _ = layer_norm(x.astype(acc), 1e-5)
        return (normed * self.gain[...].astype(acc) + self.bias[...].astype(acc)).astype(x.dtype)


NORMS = 'layer', 'rms'


def modulate_normed(norm: RmsNorm | None, x_BND: Array, shift_BD: Array, scale_BD: Array) -> Array:
    """`modulate`, or with a norm of its own in the place of LayerNorm: norm(x)·(1 + scale) + shift."""
    if norm is None:
        return modulate(x_BND, shift_BD, scale_BD)
    acc = accumulator(x_BND.dtype)
    normed = norm(x_BND.astype(acc))
    shift, scale = shift_BD.astype(acc)[:, None], scale_BD.astype(acc)[:, None]
    return (normed * (1 + scale) + shift).astype(x_BND.dtype)


def timestep_features(t_B: Array, dim: int = 256, dtype=jnp.float32) -> Array:
    """[cos(t·f), sin(t·f)], f_k = 10000^(-k/(dim/2)): DiT puts cos first, divides by dim/2, not dim/2 - 1."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=dtype) / half)
    angles = t_B.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed 2-D sin-cos table [N, D], float32 (computed in float64, rounded as DiT's), see `sincos_table`."""
    return sincos_table(np.arange(grid[0]), np.arange(grid[1]), width).astype(np.float32)


def sincos_table(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Sines and cosines of the coordinates of a grid [H·W, D] in float64; token n = row·W + column. The first
    half of the channels holds the column, the second the row, in each half all sines before all cosines."""
    library = np if isinstance(rows, np.ndarray) else jnp      # jnp has float32
    rows, columns = library.meshgrid(rows, columns, indexing='ij')
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))

    def encode(positions):
        wide = np.float64 if library is np else np.float32
        angles = positions.reshape(-1, 1).astype(wide) * omega.astype(wide)
        return library.concatenate([library.sin(angles), library.cos(angles)], axis=1)

    return library.concatenate([encode(columns), encode(rows)], axis=1)


class TimestepEmbedder(nnx.Module):
    """t_B -> [B, D]: sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.fc1 = Linear(256, width, init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, width, init=normal_init(0.02), dtype=dtype, rngs=rngs)

    def __call__(self, t_B: Array) -> Array:
        # Features in the accumulator: bfloat16 cannot tell t = 998 from 999.
        return self.fc2(jax.nn.silu(self.fc1(timestep_features(t_B, dtype=accumulator(self.dtype)))))


class LabelEmbedder(nnx.Module):
    """Class index -> [B, D]. Row `num_classes` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.table = nnx.Param(normal_init(0.02)(rngs.params(), (num_classes + 1,), (width,)))

    def __call__(self, y_B: Array) -> Array:
        table = constrain(self.table[...], None, None)      # small; sharded rows would be regrouped
        return jnp.take(table, y_B, axis=0).astype(self.dtype)


def check_grid(x_BND: Array, grid: tuple[int, int]) -> None:
    """UserError where the tokens do not fill the grid (H, W): for layers that see neighbours."""
    if grid[0] * grid[1] != x_BND.shape[1]:
        raise UserError(f'{x_BND.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}; give theirs')


def patchify(x_BHWC: Array, patch: int) -> Array:
    """[B, H, W, C] -> [B, N, patch, patch, C], tokens row by row."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch, patch, c)


def unpatchify(x_BNO: Array, grid: tuple[int, int], patch: int) -> Array:
    """[B, N, patch·patch·O] -> [B, H, W, O], the inverse order of `patchify`."""
    b, (rows, columns) = x_BNO.shape[0], grid
    x = x_BNO.reshape(b, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, -1)


REMAT_POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_saveable,
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def build_stack(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module with `depth` independent initialisations of a block on a leading axis of every Param."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make_block, in_axes=(0,), out_axes=0))(rngs)


def run_stack(stack: nnx.Module, x: Array, *args, scan: bool = True, remat: str = 'none') -> Array:
    """Applies the blocks of `stack` one after the other: x = block(x, *args). `scan` compiles one block and
    loops over it (compile time constant in depth); otherwise blocks are unrolled, which some back-ends run
    faster. `remat`: a policy of REMAT_POLICIES. Values that the blocks show (`lit_jax.models.probe`) are
    shown again with a leading layer axis."""
    graphdef, params = nnx.split(_made_ready(stack))
    names = watched()

    def body(x, block_params):
        with watching(*names) as seen:
            x = nnx.merge(graphdef, block_params)(x, *args)
        return x, {name: values[0] for name, values in seen.items() if values}

    if remat != 'none':
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if scan:
        x, shown = jax.lax.scan(body, x, params)
    else:
        layers = []
        for layer in range(jax.tree.leaves(params)[0].shape[0]):
            x, one = body(x, jax.tree.map(operator.itemgetter(layer), params))
            layers.append(one)
        shown = {name: jnp.stack([one[name] for one in layers]) for name in layers[0]}
    show_all(shown)
    return x


def _made_ready(stack: nnx.Module) -> nnx.Module:
    """A copy whose projections are ready for a loop; subclasses of `Linear` use their kernels otherwise."""
    stack = nnx.merge(*nnx.split(stack))
    for _, module in nnx.iter_graph(stack):
        if type(module) is Linear:
            module.make_ready()
    return stack


MIXER_INPUT, MIXER_OUTPUT = 'mixer/input', 'mixer/output'
BLOCK_OUTPUT = 'block/output'


def show_mixer(mixer: nnx.Module, x_BND: Array, grid: tuple[int, int]) -> Array:
    """mixer(x, grid), both sides shown to those who watch MIXER_INPUT and MIXER_OUTPUT."""
    show(MIXER_INPUT, x_BND)
    with jax.named_scope('mixer'):
        output = mixer(x_BND, grid)
    show(MIXER_OUTPUT, output)
    return output


def map_stack(function: Callable, stack: nnx.Module, *layered: Array, scan: bool = True):
    """function(parameters, build, *arrays) of each layer of a stack on its own; results with a layer axis.
    parameters: a plain dict; build(parameters) -> the layer's module. layered: arrays [layers, ...]."""
    graphdef, state = nnx.split(stack)
    params = nnx.to_pure_dict(state)

    def one(args):
        own, *rest = args
        return function(own, functools.partial(nnx.merge, graphdef), *rest)

    if scan:
        return jax.lax.map(one, (params, *layered))
    layers = jax.tree.leaves(params)[0].shape[0]
    results = [one(jax.tree.map(operator.itemgetter(layer), (params, *layered))) for layer in range(layers)]
    return jax.tree.map(lambda *values: jnp.stack(values), *results)
