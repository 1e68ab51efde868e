"""The autoencoder of latent diffusion: AutoencoderKL of Stable Diffusion, SDXL (arXiv 2112.10752, G.1).

Images are NHWC in [-1, 1]; latents are the network's own: the scale that a diffusion model expects
(`lit_jax.checkpoint.vae_folder.Vae.scale`) is not applied here. D is the width (channels). Modules are named
as in diffusers where possible; children are named, not listed, so that parameter paths hold no bare numbers.

    mean, logvar = network.encode(params, image)
    latent = sample_posterior(mean, logvar, key)
    image = network.decode(params, latent)      # large ones: network.decode(params, latent, tile=64)"""
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.models.convolution import Conv, GroupNorm
from lit_jax.models.functional import Functional
from lit_jax.models.layers import Array
from lit_jax.models.mixers.softmax import SoftmaxAttention
from lit_jax.models.partition import PLACES, constrain, mesh_axis_size
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown, shown_name

# The published networks of Stable Diffusion 1, 2 and XL differ in their weights and scale only.
MOST = 10 ** 5       # of any number of an architecture from a file
SD_ARCH = {'widths': (128, 256, 512, 512), 'layers': 2, 'groups': 32, 'channels': 4, 'image_channels': 3,
           'quant_conv': True, 'post_quant_conv': True, 'mid_attention': True,
           'attention_levels': ()}      # with attention after each residual block (VA-VAE: its last)
LOGVAR_RANGE = (-30.0, 20.0)      # AutoencoderKL's clamp


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
    """Residual blocks at one resolution, each followed by attention if there is any, then `resample` (None at
    the end of a tower)."""

    def __init__(self, width_in: int, width_out: int, layers: int, groups: int, resample: Conv | None,
                 attention: bool = False, *, dtype, rngs: nnx.Rngs):
        self.layers, self.resample, self.attends = layers, resample, attention
        for i in range(layers):
            block = ResnetBlock(width_in if i == 0 else width_out, width_out, groups, dtype=dtype, rngs=rngs)
            setattr(self, f'resnet{i}', block)
            if attention:
                setattr(self, f'attention{i}', AttentionBlock(width_out, groups, dtype=dtype, rngs=rngs))

    def __call__(self, x_BHWD: Array) -> Array:
        for i in range(self.layers):
            x_BHWD = getattr(self, f'resnet{i}')(x_BHWD)
            if self.attends:
                x_BHWD = getattr(self, f'attention{i}')(x_BHWD)
        return x_BHWD if self.resample is None else self.resample(x_BHWD)


def _run_levels(tower, x_BHWD: Array) -> Array:
    for i in range(tower.levels):
        x_BHWD = getattr(tower, f'level{i}')(x_BHWD)
    return x_BHWD


class Encoder(nnx.Module):
    """[B, H, W, image channels] -> [B, h, w, channels_out]: levels from wide images to deep ones."""

    def __init__(self, image_channels: int, channels_out: int, widths: Sequence[int], layers: int,
                 groups: int, attention: bool, attention_levels: Sequence[int] = (), *, dtype,
                 rngs: nnx.Rngs):
        options = {'dtype': dtype, 'rngs': rngs}
        self.levels = len(widths)
        self.conv_in = Conv(image_channels, widths[0], **options)
        for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            # The published networks pad their strided convolutions on the right and at the bottom only.
            down = Conv(width, width, stride=2, padding=(0, 1), **options) if i + 1 < len(widths) else None
            level = Level(before, width, layers, groups, down, i in attention_levels, **options)
            setattr(self, f'level{i}', level)
        self.mid = MidBlock(widths[-1], groups, attention, **options)
        self.norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], channels_out, **options)

    def __call__(self, x_BHWC: Array) -> Array:
        x = self.mid(_run_levels(self, self.conv_in(x_BHWC)))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """[B, h, w, channels] -> [B, H, W, image channels]: the encoder's levels backwards, a block deeper."""

    def __init__(self, channels: int, image_channels: int, widths: Sequence[int], layers: int, groups: int,
                 attention: bool, attention_levels: Sequence[int] = (), *, dtype, rngs: nnx.Rngs):
        options, widths = {'dtype': dtype, 'rngs': rngs}, tuple(reversed(widths))
        self.levels = len(widths)
        self.conv_in = Conv(channels, widths[0], **options)
        self.mid = MidBlock(widths[0], groups, attention, **options)
        for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            up = UpsampleConv(width, width, **options) if i + 1 < len(widths) else None
            attends = self.levels - 1 - i in attention_levels
            setattr(self, f'level{i}', Level(before, width, layers + 1, groups, up, attends, **options))
        self.norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], image_channels, **options)

    def __call__(self, z_BHWC: Array) -> Array:
        x = _run_levels(self, self.mid(self.conv_in(z_BHWC)))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Both towers and the 1 x 1 convolutions between them and the latent."""

    def __init__(self, *, widths, layers: int, groups: int, channels: int, image_channels: int,
                 quant_conv: bool, post_quant_conv: bool, mid_attention: bool,
                 attention_levels: Sequence[int] = (), dtype, rngs: nnx.Rngs):
        tower = {'widths': widths, 'layers': layers, 'groups': groups, 'attention': mid_attention,
                 'attention_levels': attention_levels, 'dtype': dtype, 'rngs': rngs}
        self.encoder = Encoder(image_channels, 2 * channels, **tower)
        point = functools.partial(Conv, size=1, padding=(0, 0), dtype=dtype, rngs=rngs)
        self.quant_conv = point(2 * channels, 2 * channels) if quant_conv else None
        self.post_quant_conv = point(channels, channels) if post_quant_conv else None
        self.decoder = Decoder(channels, image_channels, **tower)

    def encode(self, image_BHWC: Array) -> Array:
        """Moments [B, h, w, 2C]: mean, then log-variance, not clamped."""
        moments = self.encoder(image_BHWC)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latent_BHWC: Array) -> Array:
        point = self.post_quant_conv
        return self.decoder(latent_BHWC if point is None else point(latent_BHWC))


class VaeNetwork(Functional):
    """An autoencoder as functions: `init`, `abstract`, `encode` and `decode`.

    Args:
        arch: fields that differ from `SD_ARCH`: `widths` of the levels, residual blocks a level (`layers`;
            the decoder has one more), `groups` of the norms, `channels` of the latent, `image_channels`,
            whether there are quant_conv, post_quant_conv and attention in the middle, and the levels that
            have attention, too (0: the widest).
        dtype: compute dtype (float32 or bfloat16; float64 in tests). Parameters are always float32, norms and
            softmax are computed in float32 or wider."""

    def __init__(self, arch: Mapping, *, dtype=jnp.float32):
        self.arch = check_vae_arch(arch)
        self.dtype = dtype
        super().__init__(lambda rngs: Autoencoder(**self.arch, dtype=dtype, rngs=rngs))

    @property
    def downscale(self) -> int:
        """Image pixels a latent pixel, each way."""
        return 2 ** (len(self.arch['widths']) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latent."""
        return self.arch['channels']

    def encode(self, params: dict, image_BHWC: Array, *, one_by_one: bool = False) -> tuple[Array, Array]:
        """Images in [-1, 1] -> (mean, logvar) [B, h, w, C] in float32, logvar clamped to [-30, 20].

        one_by_one: one image at a time and device, with the memory of one image at any batch size."""
        self._check(image_BHWC, self.arch['image_channels'], self.downscale, 'images')
        encode = self._merge(params).encode
        moments = _one_by_one(encode, image_BHWC) if one_by_one else encode(image_BHWC)
        mean, logvar = jnp.split(moments.astype(accumulator(self.dtype)), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, params: dict, latent_BHWC: Array, *, one_by_one: bool = False, tile: int | None = None,
               overlap: int | None = None) -> Array:
        """Unscaled latents [B, h, w, C] -> images [B, H, W, image channels] in float32, not clipped.

        Args:
            one_by_one: one image at a time and device, with the memory of one image at any batch size.
            tile: side in latent pixels of squares that are decoded one after the other and blended where they
                overlap, with the memory of one square and of the image. Norms and attention then see one
                square only, so the image differs a little from the one decoded whole, less with larger tiles.
                Images that fit in one tile are decoded whole.
            overlap: latent pixels that neighbouring squares share at least, default tile / 4."""
        self._check(latent_BHWC, self.channels, 1, 'latents')
        model = self._merge(params)

        def decode(z_BHWC: Array) -> Array:
            return model.decode(z_BHWC).astype(accumulator(self.dtype))

        if tile is not None:
            decode = functools.partial(decode_tiles, decode, tile=tile, overlap=_check_tile(tile, overlap),
                                       downscale=self.downscale)
        return _one_by_one(decode, latent_BHWC) if one_by_one else decode(latent_BHWC)

    def _check(self, x: Array, channels: int, multiple: int, what: str) -> None:
        if x.ndim != 4 or x.shape[-1] != channels:
            raise UserError(f'{what} of this VAE have the shape [B, H, W, {channels}], got {list(x.shape)}')
        if any(side < multiple or side % multiple for side in x.shape[1:3]):
            raise UserError(f'{what} of {x.shape[1]} x {x.shape[2]} pixels cannot be encoded: both sides '
                            f'must be multiples of {multiple}. Crop or resize them')


def sample_posterior(mean: Array, logvar: Array, key: Array) -> Array:
    """mean + exp(logvar / 2) · noise, in the dtype of `mean`."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def _one_by_one(function: Callable[[Array], Array], x_BHWC: Array) -> Array:
    """`function` on one image at a time; on a mesh each device takes its own, and nothing is communicated."""
    devices = math.prod(map(mesh_axis_size, PLACES['batch']))
    devices = devices if len(x_BHWC) % devices == 0 else 1
    turns = x_BHWC.reshape(devices, -1, *x_BHWC.shape[1:]).swapaxes(0, 1)
    y = jax.lax.map(lambda x: function(constrain(x, 'batch', None, None, None)), turns).swapaxes(0, 1)
    return y.reshape(len(x_BHWC), *y.shape[2:])


def _check_tile(tile: int, overlap: int | None) -> int:
    if tile < 1:
        raise UserError(f'tiles have a side of at least 1 latent pixel, got {tile}')
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap < tile:
        raise UserError(f'tiles of {tile} latent pixels cannot overlap by {overlap}; give 0 to {tile - 1}')
    return overlap


def decode_tiles(decode: Callable[[Array], Array], z_BHWC: Array, tile: int, overlap: int,
                 downscale: int) -> Array:
    """Decodes squares one after the other and adds them up, faded out where they overlap."""
    sides = z_BHWC.shape[1:3]
    if max(sides) <= tile:
        return decode(z_BHWC)
    (row_starts, row_weights), (column_starts, column_weights) = (
        cover(side, min(tile, side), overlap, downscale) for side in sides)
    size = (len(z_BHWC), min(tile, sides[0]), min(tile, sides[1]), z_BHWC.shape[-1])

    def add(image, position):
        i, j = position
        corner = (0, rows[i], columns[j], 0)
        square = decode(jax.lax.dynamic_slice(z_BHWC, corner, size))
        square = square * row_fades[i][:, None, None] * column_fades[j][:, None]
        corner = (0, rows[i] * downscale, columns[j] * downscale, 0)
        there = jax.lax.dynamic_slice(image, corner, square.shape)
        return jax.lax.dynamic_update_slice(image, there + square, corner), None

    one = jax.eval_shape(decode, jax.ShapeDtypeStruct(size, z_BHWC.dtype))
    image = jnp.zeros((len(z_BHWC), *(side * downscale for side in sides), one.shape[-1]), one.dtype)
    row_fades, column_fades = (jnp.asarray(weights, one.dtype) for weights in (row_weights, column_weights))
    rows, columns = jnp.asarray(row_starts), jnp.asarray(column_starts)
    positions = jnp.stack(jnp.meshgrid(jnp.arange(len(rows)), jnp.arange(len(columns)), indexing='ij'), -1)
    return jax.lax.scan(add, image, positions.reshape(-1, 2))[0]


def cover(side: int, tile: int, overlap: int, downscale: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts [T], weights [T, tile · downscale]) of the tiles along an axis; all arguments in latent pixels.
    The first tile starts at 0, the last ends at `side`, the others are evenly spaced. A tile fades in and out
    linearly over the decoded pixels that it shares with its neighbours; at each pixel the weights add up to
    1."""
    count = 1 if tile == side else -(-(side - overlap) // (tile - overlap))
    starts = np.round(np.linspace(0, side - tile, count)).astype(np.int32)
    pixels = np.arange(tile * downscale) + 0.5
    weights = np.ones((count, len(pixels)))
    for k, shared in enumerate((starts[:-1] + tile - starts[1:]) * downscale):
        if shared:
            ramp = np.clip(pixels / shared, 0, 1)
            weights[k + 1] *= ramp
            weights[k] *= ramp[::-1]
    total = np.zeros(side * downscale)
    spans = [slice(start * downscale, start * downscale + len(pixels)) for start in starts]
    for span, weight in zip(spans, weights, strict=True):
        total[span] += weight
    return starts, np.stack([weight / total[span] for span, weight in zip(spans, weights, strict=True)])


def check_vae_arch(arch: Mapping) -> dict:
    """A complete copy of `arch` with the fields of SD_ARCH. UserError for a wrong field."""
    if unknown := set(arch) - set(SD_ARCH):
        raise UserError(f'the VAE has unknown fields {", ".join(sorted(map(shown_name, unknown)))}; known: '
                        f'{", ".join(SD_ARCH)}')
    arch = {**SD_ARCH, **arch}
    arch['widths'] = tuple(arch['widths']) if isinstance(arch['widths'], list | tuple) else (arch['widths'],)
    numbers = {'layers': arch['layers'], 'groups': arch['groups'], 'channels': arch['channels'],
               'image_channels': arch['image_channels'],
               **{f'widths[{i}]': w for i, w in enumerate(arch['widths'])}}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise UserError(f'vae.{name} must be a positive integer, at most {MOST}, got {shown(value)}')
    for name in ('quant_conv', 'post_quant_conv', 'mid_attention'):
        if not isinstance(arch[name], bool):
            raise UserError(f'vae.{name} must be true or false, got {shown(arch[name])}')
    if arch['layers'] > 100 or len(arch['widths']) > 16:      # far beyond any; each is built
        raise UserError(f'vae.layers {arch["layers"]} and {len(arch["widths"])} vae.widths: at most 100 and '
                        '16 are possible')
    if not arch['widths']:
        raise UserError('vae.widths is empty; it lists the channels of each level, e.g. (128, 256, 512, 512)')
    levels = arch['attention_levels']
    if not isinstance(levels, list | tuple) or any(
            isinstance(level, bool) or level not in range(len(arch['widths'])) for level in levels):
        raise UserError(f'vae.attention_levels must be some of the levels 0 to {len(arch["widths"]) - 1}, '
                        f'got {shown(levels)}')
    arch['attention_levels'] = tuple(levels)
    if wrong := [width for width in arch['widths'] if width % arch['groups']]:
        raise UserError(f'vae.widths: {wrong[0]} channels cannot be split into {arch["groups"]} vae.groups')
    return arch
