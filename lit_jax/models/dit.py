"""The class-conditional backbone: DiT (arXiv 2212.09748), with any token mixer in the place of self-attention.

With `softmax` it is DiT, with `linear` it is LiT (arXiv 2501.12976), which keeps everything but the attention.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.ffn import Mlp
from lit_jax.models.layers import (
    Array,
    LabelEmbedder,
    Linear,
    TimestepEmbedder,
    build_stack,
    gate,
    modulate,
    patchify,
    position_table,
    run_stack,
    unpatchify,
    zeros_init,
)
from lit_jax.models.mixers import build_mixer
from lit_jax.models.partition import constrain


class Block(nnx.Module):
    """adaLN-Zero block: x += gate·mixer(modulate(LN(x))), then x += gate·mlp(modulate(LN(x)))."""

    def __init__(self, width: int, mlp_ratio: float, mixer: dict, *, dtype, rngs: nnx.Rngs):
        self.attn = build_mixer(mixer, width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, mlp_ratio, dtype=dtype, rngs=rngs)
        self.adaLN = Linear(width, (6, width), init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, c_BD: Array, grid: tuple[int, int]) -> Array:
        """x [B, N, D] and the condition [B, D] (before its SiLU) -> [B, N, D]."""
        x_BND = constrain(x_BND, 'batch', 'tokens', None)
        modulation = constrain(self.adaLN(jax.nn.silu(c_BD)), 'batch', None, None)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (modulation[:, i] for i in range(6))
        x = x_BND + gate(self.attn(modulate(x_BND, shift_msa, scale_msa), grid), gate_msa)
        return x + gate(self.mlp(modulate(x, shift_mlp, scale_mlp)), gate_mlp)


class FinalLayer(nnx.Module):
    """Modulated norm, then a linear map from each token to its patch of outputs (all zero at the start)."""

    def __init__(self, width: int, patch: int, out_channels: int, *, dtype, rngs: nnx.Rngs):
        self.adaLN = Linear(width, (2, width), init=zeros_init, dtype=dtype, rngs=rngs)
        self.linear = Linear(width, patch * patch * out_channels, init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, c_BD: Array) -> Array:
        modulation = self.adaLN(jax.nn.silu(c_BD))
        return self.linear(modulate(x_BND, modulation[:, 0], modulation[:, 1]))


class DiT(nnx.Module):
    """x_t [B, H, W, C], t [B], label [B] -> [B, H, W, 2C]: predicted noise, then the raw variance channels.

    Args:
        depth, width, patch: as in DiT's table of sizes (`lit_jax.config.SIZES`).
        input_size: (H, W) of the latent or image; need not be square, each side a multiple of `patch`.
        channels: C. With `learn_sigma` the output has 2C channels, otherwise C.
        num_classes: label `num_classes` is the null class.
        mixer: {'name': ..., options} of `lit_jax.models.mixers`.
        dtype: compute dtype. scan_layers, remat: see `run_stack`.
    """

    def __init__(self, *, depth: int, width: int, patch: int, input_size: tuple[int, int], channels: int,
                 num_classes: int, mixer: dict, mlp_ratio: float = 4.0, learn_sigma: bool = True,
                 dtype=jnp.float32, scan_layers: bool = True, remat: str = 'none', rngs: nnx.Rngs):
        self.patch, self.width, self.dtype = patch, width, dtype
        self.grid = (input_size[0] // patch, input_size[1] // patch)
        self.scan_layers, self.remat = scan_layers, remat
        self.x_embedder = Linear((patch, patch, channels), width, dtype=dtype, rngs=rngs)
        self.t_embedder = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.y_embedder = LabelEmbedder(num_classes, width, dtype=dtype, rngs=rngs)
        self.blocks = build_stack(lambda rngs: Block(width, mlp_ratio, mixer, dtype=dtype, rngs=rngs), depth, rngs)
        self.final_layer = FinalLayer(width, patch, channels * (2 if learn_sigma else 1), dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, t_B: Array, y_B: Array) -> Array:
        """t_B: original timestep indices (0..999), integer or float. Returns the compute dtype."""
        x_BHWC = constrain(x_BHWC, 'batch', 'rows', None, None)
        x = self.x_embedder(patchify(x_BHWC, self.patch)) + position_table(self.grid, self.width).astype(self.dtype)
        c = constrain(self.t_embedder(t_B) + self.y_embedder(y_B), 'batch', None)
        x = run_stack(self.blocks, x, c, self.grid, scan=self.scan_layers, remat=self.remat)
        x = constrain(self.final_layer(x, c), 'batch', 'tokens', None)
        return constrain(unpatchify(x, self.grid, self.patch), 'batch', 'rows', None, None)
