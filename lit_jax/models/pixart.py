"""The text-to-image backbone: PixArt-Σ (arXiv 2403.04692) with any token mixer in place of self-attention.

With `softmax` it is PixArt-Σ, with `linear` and two heads LiT-0.6B (arXiv 2501.12976, §4.2). Unlike DiT it
has one modulation for all blocks (adaLN-single), which each block shifts by a table; cross-attention to a
caption in every block; and images of any size and aspect ratio."""
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.models.dit import add_stacks
from lit_jax.models.ffn import FFNS
from lit_jax.models.layers import (
    Array,
    Linear,
    TimestepEmbedder,
    gate,
    modulate,
    normal_init,
    patchify,
    run_stack,
    show_mixer,
    sincos_table,
    unpatchify,
    zeros_init,
)
from lit_jax.models.mixers import build_mixer
from lit_jax.models.partition import constrain
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError

PUBLISHED_WIDTH, PUBLISHED_CAPTION_CHANNELS = 1152, 4096


def modulation_table(parts: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A block's shift of the shared modulation: N(0, 1)/√D at the start."""
    return nnx.Param(jax.random.normal(rngs.params(), (parts, width), jnp.float32) / width ** 0.5)


class CaptionEmbedder(nnx.Module):
    """Features of a text encoder [B, L, C] -> [B, L, D]: Linear, GELU (tanh), Linear."""

    def __init__(self, channels: int, width: int, *, dtype, rngs: nnx.Rngs):
        # PixArt's 0.02 at its own sizes; with weights as small, a small model would hardly see its captions.
        first, second = (0.02 * (published / inputs) ** 0.5 for published, inputs in
                         ((PUBLISHED_CAPTION_CHANNELS, channels), (PUBLISHED_WIDTH, width)))
        self.fc1 = Linear(channels, width, init=normal_init(first), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(width, width, init=normal_init(second), dtype=dtype, rngs=rngs)
        rngs.params()      # a key that earlier versions used here: initialisation stays the same

    def __call__(self, text_BLC: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(text_BLC), approximate=True))


class CrossAttention(nnx.Module):
    """softmax(q·kᵀ/√E)·v with queries from the image, keys and values from the caption; padding is masked.
    The output projection is zero at the start (PixArt), so a new layer changes nothing."""

    def __init__(self, width: int, *, heads: int, dtype, rngs: nnx.Rngs):
        head = (heads, width // heads)
        self.q = Linear(width, head, dtype=dtype, rngs=rngs)
        self.kv = Linear(width, (2, *head), dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, y_BLD: Array, mask_BL: Array) -> Array:
        """x [B, N, D], caption [B, L, D], mask [B, L] (0 is padding) -> [B, N, D]."""
        q_BNKE = constrain(self.q(x_BND), 'batch', 'tokens', 'heads', None)
        kv = constrain(self.kv(y_BLD), 'batch', None, None, 'heads', None)
        return self.proj(masked_attention(q_BNKE, kv[:, :, 0], kv[:, :, 1], mask_BL))


def masked_attention(q_BNKE: Array, k_BLKE: Array, v_BLKE: Array, mask_BL: Array) -> Array:
    """[B, N, K, E] in the dtype of q; logits and sums in the accumulator; keys with mask 0 get no weight.

    A row without any key gives the mean of the values, not NaN: only rows that fill up a batch have none."""
    acc, scale = accumulator(q_BNKE.dtype), q_BNKE.shape[-1] ** -0.5
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BNKE, k_BLKE, v_BLKE))
    logits = jnp.einsum('bkne,bkle->bknl', q, k, preferred_element_type=acc)
    logits = jnp.where(mask_BL[:, None, None, :] != 0, logits * scale, jnp.finfo(acc).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.swapaxes(jnp.einsum('bknl,bkle->bkne', weights, v, preferred_element_type=acc).astype(q.dtype),
                        1, 2)


class Block(nnx.Module):
    """x += gate·mixer(modulate(LN(x))), x += cross-attention(x), x += gate·mlp(modulate(LN(x))). The
    cross-attention has neither norm nor modulation nor gate."""

    def __init__(self, width: int, mlp_ratio: float, mixer: Mapping, ffn: str, cross_heads: int, *, dtype,
                 rngs: nnx.Rngs):
        self.scale_shift_table = modulation_table(6, width, rngs)
        self.attn = build_mixer(mixer, width, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossAttention(width, heads=cross_heads, dtype=dtype, rngs=rngs)
        self.mlp = FFNS[ffn](width, mlp_ratio, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, t_B6D: Array, y_BLD: Array, mask_BL: Array,
                 grid: tuple[int, int]) -> Array:
        """x [B, N, D], the shared modulation [B, 6, D], the embedded caption and its mask -> [B, N, D]."""
        x_BND = constrain(x_BND, 'batch', 'tokens', None)
        modulation = constrain(self.scale_shift_table[...].astype(t_B6D.dtype) + t_B6D, 'batch', None, None)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (modulation[:, i] for i in range(6))
        x = x_BND + gate(show_mixer(self.attn, modulate(x_BND, shift_msa, scale_msa), grid), gate_msa)
        x = x + self.cross_attn(x, y_BLD, mask_BL)
        return x + gate(self.mlp(modulate(x, shift_mlp, scale_mlp), grid), gate_mlp)


class FinalLayer(nnx.Module):
    """Norm modulated by its table and the timestep, then a linear map to the outputs (zero at first)."""

    def __init__(self, width: int, patch: int, out_channels: int, *, dtype, rngs: nnx.Rngs):
        self.scale_shift_table = modulation_table(2, width, rngs)
        self.linear = Linear(width, patch * patch * out_channels, init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, t_BD: Array) -> Array:
        modulation = self.scale_shift_table[...].astype(t_BD.dtype) + t_BD[:, None]
        return self.linear(modulate(x_BND, modulation[:, 0], modulation[:, 1]))


class PixArt(nnx.Module):
    """x_t [B, H, W, C], t [B], caption features [B, L, Cy] -> [B, H, W, 2C]: noise, raw variance.

    Args (others as for `lit_jax.models.dit.DiT`):
        input_size: (H, W) of its usual latents; it takes any others with sides that are multiples of `patch`.
        cross_heads: of the cross-attention.
        caption_channels, caption_tokens: Cy and L of the text encoder's features (T5-XXL: 4096, 300 tokens).
        base_size, pe_interpolation: a token's coordinate is i·base_size/(side·pe_interpolation) along each
            side, see `position_coordinates`; PixArt-Σ has 0.5, 1, 2, 4 at 256, 512, 1024, 2048 pixels, so
            that coordinates always run from 0 to 32."""
    conditioning = 'text'

    def __init__(self, *, depth: int, width: int, patch: int, input_size: tuple[int, int], channels: int,
                 mixer: Mapping, cross_heads: int, caption_channels: int, caption_tokens: int, base_size: int,
                 pe_interpolation: float, mlp_ratio: float = 4.0, ffn: str = 'mlp',
                 stages: Sequence[Mapping] = (), learn_sigma: bool = True, dtype=jnp.float32,
                 scan_layers: bool = True, remat: str = 'none', rngs: nnx.Rngs):
        self.patch, self.width, self.dtype = patch, width, dtype
        self.base_size, self.pe_interpolation = base_size, pe_interpolation
        self.scan_layers, self.remat = scan_layers, remat
        self.x_embedder = Linear((patch, patch, channels), width, dtype=dtype, rngs=rngs)
        self.t_embedder = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.t_block = Linear(width, (6, width), init=normal_init(0.02), dtype=dtype, rngs=rngs)
        self.y_embedder = CaptionEmbedder(caption_channels, width, dtype=dtype, rngs=rngs)

        def make(own, rngs):
            return Block(width, mlp_ratio, own, ffn, cross_heads, dtype=dtype, rngs=rngs)

        self.stacks = add_stacks(self, make, depth, mixer, stages, rngs)
        self.final_layer = FinalLayer(width, patch, channels * (1 + learn_sigma), dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, t_B: Array, cond: Mapping[str, Array]) -> Array:
        """cond: 'text' [B, L, Cy] (no caption: the features of the empty one); optionally 'text_mask' [B, L],
        0 for padding. t_B: 0..999, fractions allowed."""
        rows, columns = (side // self.patch for side in x_BHWC.shape[1:3])
        x = self.x_embedder(patchify(constrain(x_BHWC, 'batch', 'rows', None, None), self.patch))
        i, j = (position_coordinates(n, self.base_size, self.pe_interpolation) for n in (rows, columns))
        x = x + jnp.asarray(sincos_table(i, j, self.width), self.dtype)
        t_BD = constrain(self.t_embedder(t_B), 'batch', None)
        t_B6D = constrain(self.t_block(jax.nn.silu(t_BD)), 'batch', None, None)
        y = constrain(self.y_embedder(cond['text']), 'batch', None, None)
        mask = cond['text_mask'] if 'text_mask' in cond else jnp.ones(y.shape[:2], jnp.int32)
        for name in self.stacks:
            x = run_stack(getattr(self, name), x, t_B6D, y, mask, (rows, columns), scan=self.scan_layers,
                          remat=self.remat)
        x = constrain(self.final_layer(x, t_BD), 'batch', 'tokens', None)
        return constrain(unpatchify(x, (rows, columns), self.patch), 'batch', 'rows', None, None)


def position_coordinates(side: int, base_size: int, pe_interpolation: float) -> np.ndarray:
    """[side]: coordinates from 0 up to base_size/pe_interpolation, in float32 as in PixArt."""
    library = np if isinstance(side, int) else jnp      # exported for any side
    return library.arange(side, dtype=np.float32) / (side / base_size) / pe_interpolation


def check_pixart(arch: Mapping) -> None:
    """UserError for a wrong field of PixArt; `check_arch` checks the others, and all ranges."""
    if arch['width'] % arch['cross_heads']:
        raise UserError(f'model.cross_heads {arch["cross_heads"]} does not divide the width {arch["width"]}')
