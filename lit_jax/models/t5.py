"""The text encoder: the encoder half of T5 version 1.1 and Flan-T5 (arXiv 1910.10683, 2002.05202).

    network = T5Network(arch)
    text_BLD = network.apply(params, ids_BL, mask_BL)      # last hidden state: PixArt-Σ's captions

Weights are float32, bfloat16, or int8 with one float32 scale for each output channel (weight only:
activations stay floating point). RMS norms, the position bias and softmax are in float32 or wider. Letters of
shapes: B batch, L tokens, D width, K heads, E head dim, F inner width of the mlp, S layers."""
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.models.functional import Functional
from lit_jax.models.layers import Array, build_stack, normal_init, run_stack
from lit_jax.models.partition import constrain
from lit_jax.runtime.compiler import least_memory
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown, shown_name

WEIGHTS = ('float32', 'bfloat16', 'int8')
NORM_EPS = 1e-6
MOST = 10 ** 7       # of any number of an architecture from a file
T5_ARCH = {'vocab': 32128, 'width': 4096, 'layers': 24, 'heads': 64, 'head_dim': 64, 'ffn': 10240,
           'buckets': 32, 'max_distance': 128}
T5_XXL = T5_ARCH          # of t5-v1_1-xxl and flan-t5-xxl: 4,762,310,656 parameters


class Dense(nnx.Module):
    """A product over the first `num_in` axes of the kernel, without bias; kernel `in_shape + out_shape`."""

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], *, std, weights: str, dtype,
                 rngs: nnx.Rngs):
        self.num_in, self.dtype, self.quantised = len(in_shape), dtype, weights == 'int8'
        kernel = normal_init(1.0)(rngs.params(), in_shape, out_shape) * std
        if self.quantised:
            values, scale = quantise(kernel, self.num_in)
            self.kernel, self.scale = nnx.Param(values), nnx.Param(scale)
        else:
            self.kernel = nnx.Param(kernel.astype(weights))

    def __call__(self, x: Array) -> Array:
        """x [..., *in_shape] -> [..., *out_shape] in `dtype`."""
        lead = x.ndim - self.num_in
        axes = (tuple(range(lead, x.ndim)), tuple(range(self.num_in))), ((), ())
        if self.quantised:
            import qwix  # takes a second to import, and only int8 weights need it
            kernel = qwix.QArray(self.kernel[...], self.scale[...].astype(self.dtype))
            return qwix.dot_general(x.astype(self.dtype), kernel, axes)
        return jax.lax.dot_general(x.astype(self.dtype), self.kernel[...].astype(self.dtype), axes)


def quantise(kernel: Array, num_in: int) -> tuple[Array, Array]:
    """A float kernel -> (int8 of its shape, float32 scale with 1 for each of the first `num_in` axes). kernel
    ≈ int8 · scale, symmetric; the scale is a 127.5th of an output channel's largest entry."""
    import qwix
    quantised = qwix.quantize(jnp.asarray(kernel, jnp.float32), jnp.int8,
                              channelwise_axes=range(num_in, kernel.ndim))
    return quantised.qvalue, quantised.scale


def rms_norm(x: Array, gain_D: Array) -> Array:
    """gain · x / sqrt(mean(x²) + 1e-6) in the accumulator, returned in x's dtype; no mean is subtracted."""
    wide = x.astype(accumulator(x.dtype))
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + NORM_EPS)
    return (wide * inverse * gain_D.astype(wide.dtype)).astype(x.dtype)


def position_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance (key position - query position), int32. The first half of the buckets is
    for keys at or before the query, the second for those after it. Half of each counts single positions, the
    rest grows with the logarithm up to `max_distance`; farther keys share the last. The logarithm is float32
    as in the published code: its rounding decides where a bucket ends."""
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    with np.errstate(divide='ignore'):
        steps = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(
            half - exact)
    logarithmic = np.minimum(exact + steps.astype(np.int32), half - 1)
    near = np.abs(distance) < exact
    nearest = np.where(near, np.abs(distance), logarithmic)
    return nearest.astype(np.int32) + half * (distance > 0).astype(np.int32)


class Attention(nnx.Module):
    """Self-attention behind an RMS norm; logits are not divided by sqrt(head dim)."""

    def __init__(self, width: int, heads: int, head_dim: int, *, weights: str, dtype, rngs: nnx.Rngs):
        self.norm_gain = nnx.Param(jnp.ones(width, jnp.float32))
        # T5 draws queries smaller by sqrt(head dim) instead of scaling the logits.
        std = jnp.asarray([head_dim ** -0.5, 1, 1])[:, None, None] * width ** -0.5
        options = {'weights': weights, 'dtype': dtype, 'rngs': rngs}
        self.qkv = Dense((width,), (3, heads, head_dim), std=std, **options)
        self.proj = Dense((heads, head_dim), (width,), std=(heads * head_dim) ** -0.5, **options)

    def __call__(self, x_BLD: Array, bias_KLL: Array, padding_BL: Array) -> Array:
        q, k, v = jnp.moveaxis(self.qkv(rms_norm(x_BLD, self.norm_gain[...])), 2, 0)
        q, k, v = (constrain(part_BLKE, 'batch', None, 'heads', None) for part_BLKE in (q, k, v))
        logits = jnp.einsum('bqke,blke->bkql', q, k, preferred_element_type=bias_KLL.dtype)
        logits = logits + bias_KLL + padding_BL[:, None, None, :]
        weights_BKLL = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.proj(jnp.einsum('bkql,blke->bqke', weights_BKLL, v))


class Mlp(nnx.Module):
    """down(gelu(gate(u)) · linear(u)) of u = the RMS norm of x, gelu in its tanh form."""

    def __init__(self, width: int, ffn: int, *, weights: str, dtype, rngs: nnx.Rngs):
        options = {'weights': weights, 'dtype': dtype, 'rngs': rngs}
        self.norm_gain = nnx.Param(jnp.ones(width, jnp.float32))
        self.gate = Dense((width,), (2, ffn), std=width ** -0.5, **options)
        self.down = Dense((ffn,), (width,), std=ffn ** -0.5, **options)

    def __call__(self, x_BLD: Array) -> Array:
        gate, linear = jnp.moveaxis(self.gate(rms_norm(x_BLD, self.norm_gain[...])), 2, 0)
        return self.down(constrain(jax.nn.gelu(gate, approximate=True) * linear, 'batch', None, 'hidden'))


class Block(nnx.Module):
    """x + attention, then + mlp."""

    def __init__(self, *, width: int, heads: int, head_dim: int, ffn: int, weights: str, dtype,
                 rngs: nnx.Rngs):
        options = {'weights': weights, 'dtype': dtype, 'rngs': rngs}
        self.attn = Attention(width, heads, head_dim, **options)
        self.mlp = Mlp(width, ffn, **options)

    def __call__(self, x_BLD: Array, bias_KLL: Array, padding_BL: Array) -> Array:
        x = constrain(x_BLD, 'batch', None, None)
        x = x + self.attn(x, bias_KLL, padding_BL)
        return x + self.mlp(x)


class Table(nnx.Module):
    """Rows to look up: [rows, columns]."""

    def __init__(self, rows: int, columns: int, *, std: float, weights: str = 'float32', rngs: nnx.Rngs):
        # Rows are read, not multiplied with: int8 would save little and cost most.
        self.table = nnx.Param(normal_init(std)(rngs.params(), (rows,), (columns,)).astype(
            'bfloat16' if weights == 'int8' else weights))


class FinalNorm(nnx.Module):
    def __init__(self, width: int):
        self.gain = nnx.Param(jnp.ones(width, jnp.float32))


class T5Encoder(nnx.Module):
    """Token embedding, the blocks with one shared position bias, and a last RMS norm."""

    def __init__(self, *, vocab: int, width: int, layers: int, heads: int, head_dim: int, ffn: int,
                 buckets: int, max_distance: int, weights: str, dtype, scan_layers: bool, rngs: nnx.Rngs):
        self.buckets, self.max_distance = buckets, max_distance
        self.dtype, self.scan_layers = dtype, scan_layers
        self.embed = Table(vocab, width, std=1.0, weights=weights, rngs=rngs)
        self.position_bias = Table(buckets, heads, std=width ** -0.5, rngs=rngs)
        self.blocks = build_stack(lambda rngs: Block(width=width, heads=heads, head_dim=head_dim, ffn=ffn,
                                                     weights=weights, dtype=dtype, rngs=rngs), layers, rngs)
        self.final_norm = FinalNorm(width)

    def __call__(self, ids_BL: Array, mask_BL: Array) -> Array:
        acc, length = accumulator(self.dtype), ids_BL.shape[1]
        x_BLD = jnp.take(self.embed.table[...], ids_BL, axis=0).astype(self.dtype)
        # Added to the logits. The lowest number, not -inf: a row of padding alone must give numbers, too.
        padding_BL = jnp.where(mask_BL > 0, 0, jnp.finfo(acc).min).astype(acc)
        x_BLD = run_stack(self.blocks, x_BLD, self.distance_bias(length).astype(acc), padding_BL,
                          scan=self.scan_layers)
        return rms_norm(x_BLD, self.final_norm.gain[...])

    def distance_bias(self, length: int) -> Array:
        """The logits' bias for the distance of a key from its query [K, L, L]."""
        distance_LL = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets_LL = position_buckets(distance_LL, self.buckets, self.max_distance)
        return jnp.moveaxis(jnp.take(self.position_bias.table[...], buckets_LL, axis=0), -1, 0)


class T5Network(Functional):
    """A T5 encoder as functions: `init`, `abstract` and `apply`.

    Args:
        arch: the fields of `T5_ARCH`; buckets and max_distance may be left out (32, 128).
        dtype: compute dtype (float32 or bfloat16; float64 in tests).
        weights: how parameters are held: 'float32'; 'bfloat16'; or 'int8', where a kernel has a `scale`
            beside it and the token embedding is bfloat16. Gains and the position bias are always float32.
            `apply` takes float parameters of any dtype.
        scan_layers: see `lit_jax.models.layers.run_stack`."""

    def __init__(self, arch: Mapping, dtype=jnp.float32, weights: str = 'float32', *,
                 scan_layers: bool = True):
        self.arch = check_t5_arch(arch)
        if weights not in WEIGHTS:
            raise UserError(f"unknown form {shown(weights)} of a text encoder's weights; known: "
                            f'{", ".join(WEIGHTS)}')
        self.dtype, self.weights = dtype, weights
        super().__init__(lambda rngs: T5Encoder(**self.arch, weights=weights, dtype=dtype,
                                                scan_layers=scan_layers, rngs=rngs))

    @property
    def width(self) -> int:
        """Channels of a token's features."""
        return self.arch['width']

    def inference_options(self) -> dict:
        """`compiler_options` of jax.jit for encoding."""
        return least_memory() if self.weights == 'int8' else {}

    def apply(self, params: dict, ids_BL: Array, mask_BL: Array) -> Array:
        """The last hidden state [B, L, D] in `dtype`, padded rows too.

        ids_BL: token ids below `vocab`. mask_BL: 1 (or true) for tokens that are seen, 0 for padding."""
        if ids_BL.ndim != 2 or ids_BL.shape != mask_BL.shape:
            raise UserError(f'token ids and mask need one shape [B, L], got {ids_BL.shape}, {mask_BL.shape}')
        return self._merge(params)(ids_BL, mask_BL)


def check_t5_arch(arch: Mapping) -> dict:
    """A complete copy of `arch` with the fields of T5_ARCH. UserError for a field that cannot be."""
    if unknown := set(arch) - set(T5_ARCH):
        raise UserError(f'the text encoder has unknown fields {", ".join(sorted(map(shown_name, unknown)))}; '
                        f'known: '
                        f'{", ".join(T5_ARCH)}')
    arch = {'buckets': T5_ARCH['buckets'], 'max_distance': T5_ARCH['max_distance'], **arch}
    for name in T5_ARCH:
        value = arch.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise UserError(f'text_encoder.{name} must be a positive integer, at most {MOST}, got '
                            f'{shown(value)}')
    if arch['buckets'] % 4:
        raise UserError(f'text_encoder.buckets must be a multiple of 4, got {arch["buckets"]}')
    if arch['max_distance'] <= arch['buckets'] // 4:
        raise UserError(f'text_encoder.max_distance must be over buckets / 4, got {arch["max_distance"]}')
    return {name: arch[name] for name in T5_ARCH}
