"""Parts of the autoencoder of Stable Diffusion (`lit_jax.models.vae`): convolutions, residual blocks, two
towers.

Images are NHWC; D is the width (channels). Modules are named as in diffusers' `AutoencoderKL` where possible;
children are named, not listed, so that parameter paths hold no bare numbers."""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import Conv, GroupNorm
from lit_jax.models.layers import Array
from lit_jax.models.mixers.softmax import SoftmaxAttention
from lit_jax.runtime.dtypes import accumulator


class UpsampleConv(Conv):
    """Each pixel repeated 2 x 2, then a 3 x 3 convolution: [B, H, W, I] -> [B, 2H, 2W, O].

    Of the nine pixels under an output several are copies of one: each of the four outputs over an input pixel
    is a 2 x 2 convolution of the small image, with the kernel's rows (columns) that meet a copy added up.
    That takes 4/9 of the products, and the upsampled image is never made."""

    def __call__(self, x_BHWI: Array) -> Array:
        b, h, w, _ = x_BHWI.shape
        kernel = self.kernel[...].astype(accumulator(self.dtype))
        # The even output looks one pixel back and at its own, the odd one at its own and one ahead.
        rows = [(1, 0), (0, 1)]
        quarters = [[self.convolve(x_BHWI, _merge_taps(_merge_taps(kernel, 0, i), 1, j), rows[i], rows[j])
                     for j in range(2)] for i in range(2)]
        y = jnp.stack([jnp.stack(pair, axis=3) for pair in quarters], axis=2)      # [B, H, 2, W, 2, O]
        return self.add_bias(y.reshape(b, 2 * h, 2 * w, -1))


def _merge_taps(kernel: Array, axis: int, phase: int) -> Array:
    """Three taps on doubled pixels -> two on the image itself, for even (0) or odd (1) outputs."""
    first, middle, last = jnp.split(kernel, 3, axis)
    return jnp.concatenate([first, middle + last] if phase == 0 else [first + middle, last], axis)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); where the width changes, a 1 x 1 convolution of x."""

    def __init__(self, width_in: int, width_out: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(width_in, groups, rngs=rngs)
        self.conv1 = Conv(width_in, width_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(width_out, groups, rngs=rngs)
        self.conv2 = Conv(width_out, width_out, dtype=dtype, rngs=rngs)
        self.shortcut = None if width_in == width_out else Conv(width_in, width_out, 1, padding=(0, 0),
                                                                dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x_BHWD)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x_BHWD if self.shortcut is None else self.shortcut(x_BHWD))


class AttentionBlock(nnx.Module):
    """x + softmax attention over all pixels with one head as wide as the image."""

    def __init__(self, width: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(width, groups, rngs=rngs)
        self.attn = SoftmaxAttention(width, heads=1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array) -> Array:
        b, h, w, d = x_BHWD.shape
        return x_BHWD + self.attn(self.norm(x_BHWD).reshape(b, h * w, d), (h, w)).reshape(b, h, w, d)


class MidBlock(nnx.Module):
    """Residual block, attention (if the architecture has it), residual block."""

    def __init__(self, width: int, groups: int, attention: bool, *, dtype, rngs: nnx.Rngs):
        self.resnet0 = ResnetBlock(width, width, groups, dtype=dtype, rngs=rngs)
        self.attention = AttentionBlock(width, groups, dtype=dtype, rngs=rngs) if attention else None
        self.resnet1 = ResnetBlock(width, width, groups, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array) -> Array:
        x = self.resnet0(x_BHWD)
        return self.resnet1(x if self.attention is None else self.attention(x))


class Level(nnx.Module):
    """Residual blocks at one resolution, then `resample` (None at the end of a tower)."""

    def __init__(self, width_in: int, width_out: int, layers: int, groups: int, resample: Conv | None, *,
                 dtype, rngs: nnx.Rngs):
        self.layers, self.resample = layers, resample
        for i in range(layers):
            block = ResnetBlock(width_in if i == 0 else width_out, width_out, groups, dtype=dtype, rngs=rngs)
            setattr(self, f'resnet{i}', block)

    def __call__(self, x_BHWD: Array) -> Array:
        for i in range(self.layers):
            x_BHWD = getattr(self, f'resnet{i}')(x_BHWD)
        return x_BHWD if self.resample is None else self.resample(x_BHWD)


class Encoder(nnx.Module):
    """[B, H, W, image channels] -> [B, h, w, channels_out]: levels from wide images to deep ones."""

    def __init__(self, image_channels: int, channels_out: int, widths: Sequence[int], layers: int,
                 groups: int, attention: bool, *, dtype, rngs: nnx.Rngs):
        options = {'dtype': dtype, 'rngs': rngs}
        self.levels = len(widths)
        self.conv_in = Conv(image_channels, widths[0], **options)
        for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            # The published networks pad their strided convolutions on the right and at the bottom only.
            down = Conv(width, width, stride=2, padding=(0, 1), **options) if i + 1 < len(widths) else None
            setattr(self, f'level{i}', Level(before, width, layers, groups, down, **options))
        self.mid = MidBlock(widths[-1], groups, attention, **options)
        self.norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], channels_out, **options)

    def __call__(self, x_BHWC: Array) -> Array:
        x = self.conv_in(x_BHWC)
        for i in range(self.levels):
            x = getattr(self, f'level{i}')(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """[B, h, w, channels] -> [B, H, W, image channels]: the encoder's levels backwards, a block deeper."""

    def __init__(self, channels: int, image_channels: int, widths: Sequence[int], layers: int, groups: int,
                 attention: bool, *, dtype, rngs: nnx.Rngs):
        options, widths = {'dtype': dtype, 'rngs': rngs}, tuple(reversed(widths))
        self.levels = len(widths)
        self.conv_in = Conv(channels, widths[0], **options)
        self.mid = MidBlock(widths[0], groups, attention, **options)
        for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            up = UpsampleConv(width, width, **options) if i + 1 < len(widths) else None
            setattr(self, f'level{i}', Level(before, width, layers + 1, groups, up, **options))
        self.norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], image_channels, **options)

    def __call__(self, z_BHWC: Array) -> Array:
        x = self.mid(self.conv_in(z_BHWC))
        for i in range(self.levels):
            x = getattr(self, f'level{i}')(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))
