"""The class-conditional backbone: DiT (arXiv 2212.09748) with any token mixer in place of self-attention.
With `softmax` it is DiT; with `linear` it is LiT (arXiv 2501.12976), which changes only the attention."""
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.ffn import FFNS
from lit_jax.models.layers import (
    BLOCK_OUTPUT,
    Array,
    LabelEmbedder,
    Linear,
    RmsNorm,
    TimestepEmbedder,
    build_stack,
    gate,
    modulate_normed,
    patchify,
    position_table,
    run_stack,
    show_mixer,
    unpatchify,
    zeros_init,
)
from lit_jax.models.mixers import build_mixer
from lit_jax.models.partition import constrain
from lit_jax.models.probe import show
from lit_jax.models.projectors import Projectors
from lit_jax.runtime.errors import UserError, shown


class Block(nnx.Module):
    """adaLN-Zero block: x += gate·mixer(modulate(LN(x))), then x += gate·mlp(modulate(LN(x))). norm 'rms': an
    RMSNorm with a gain in the place of LN; shift False: the modulation has scale and gate only."""

    def __init__(self, width: int, mlp_ratio: float, mixer: Mapping, ffn: str, norm: str = 'layer',
                 shift: bool = True, *, dtype, rngs: nnx.Rngs):
        self.attn = build_mixer(mixer, width, dtype=dtype, rngs=rngs)
        self.mlp = FFNS[ffn](width, mlp_ratio, dtype=dtype, rngs=rngs)
        self.adaLN = Linear(width, (6 if shift else 4, width), apart=True, init=zeros_init, dtype=dtype,
                            rngs=rngs)
        self.norm1, self.norm2 = (RmsNorm(width) if norm == 'rms' else None for _ in range(2))

    def __call__(self, x_BND: Array, c_BD: Array, grid: tuple[int, int]) -> Array:
        """x [B, N, D] and the condition [B, D] (before its SiLU) -> [B, N, D]."""
        x_BND = constrain(x_BND, 'batch', 'tokens', None)
        with jax.named_scope('adaln'):
            modulation = constrain(self.adaLN(jax.nn.silu(c_BD)), 'batch', None, None)
        parts = [modulation[:, i] for i in range(modulation.shape[1])]
        if len(parts) == 4:
            none = jnp.zeros_like(parts[0])
            parts = [none, *parts[:2], none, *parts[2:]]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        mixed = show_mixer(self.attn, modulate_normed(self.norm1, x_BND, shift_msa, scale_msa), grid)
        x = x_BND + gate(mixed, gate_msa)
        x = x + gate(self.mlp(modulate_normed(self.norm2, x, shift_mlp, scale_mlp), grid), gate_mlp)
        show(BLOCK_OUTPUT, x)
        return x


class FinalLayer(nnx.Module):
    """Modulated norm, then a linear map from each token to its patch of outputs (zero at the start)."""

    def __init__(self, width: int, patch: int, out_channels: int, norm: str = 'layer', *, dtype,
                 rngs: nnx.Rngs):
        self.norm = RmsNorm(width) if norm == 'rms' else None
        self.adaLN = Linear(width, (2, width), apart=True, init=zeros_init, dtype=dtype, rngs=rngs)
        self.linear = Linear(width, patch * patch * out_channels, init=zeros_init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, c_BD: Array) -> Array:
        modulation = self.adaLN(jax.nn.silu(c_BD))
        return self.linear(modulate_normed(self.norm, x_BND, modulation[:, 0], modulation[:, 1]))


def stage_mixers(depth: int, mixer: Mapping, stages: Sequence[Mapping]) -> list[tuple[int, dict]]:
    """[(blocks, mixer)] of each run of equal blocks. `stages`: {'depth': ..., 'mixer': options that differ};
    () is one run. UserError where their depths do not add up to `depth`.

    A stage whose mixer has another name takes nothing of `mixer`: it has its own options and defaults."""
    if not stages:
        return [(depth, dict(mixer))]
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
        raise UserError(f'model.stages must be runs of blocks, such as ({{"depth": 2}}, {{"depth": 1, '
                        f'"mixer": {{...}}}}), or a short form such as every:4, last:2 or the numbers of '
                        f'blocks, got {shown(stages)}')
    if unknown := {str(name) for stage in stages for name in stage} - {'depth', 'mixer'}:
        raise UserError(f'a stage of model.stages has depth and mixer, not {", ".join(sorted(unknown))}')
    depths = [stage.get('depth', 0) for stage in stages]
    if not all(isinstance(own, int) for own in depths) or sum(depths) != depth or min(depths) < 1:
        raise UserError(f'model.stages have {" + ".join(map(str, depths))} blocks, model.depth is {depth}')
    if wrong := [own for stage in stages if not isinstance(own := stage.get('mixer', {}), Mapping)]:
        raise UserError(f'the mixer of a stage must be options such as {{"name": "softmax", "heads": 4}}, '
                        f'got {shown(wrong[0])}')
    return [(stage['depth'], _stage_mixer(mixer, stage.get('mixer', {}))) for stage in stages]


def _stage_mixer(mixer: Mapping, own: Mapping) -> dict:
    like = own.get('name', mixer.get('name')) == mixer.get('name')
    return {**mixer, **own} if like else dict(own)


def add_stacks(model: nnx.Module, make, depth: int, mixer: Mapping, stages: Sequence[Mapping],
               rngs: nnx.Rngs) -> tuple[str, ...]:
    """Gives a model one stack of blocks a run of `stage_mixers`: their names. make(mixer, rngs) -> block."""
    runs = stage_mixers(depth, mixer, stages)
    names = ('blocks',) if len(runs) == 1 else tuple(f'blocks{i}' for i in range(len(runs)))
    for name, (blocks, own) in zip(names, runs, strict=True):
        setattr(model, name, build_stack(functools.partial(make, own), blocks, rngs))
    return names


class OfClasses(nnx.Module):
    """Embedders and output of class-conditional models; a subclass adds blocks, then `final_layer`."""
    final_layer: nnx.Module

    def __init__(self, width: int, patch: int, input_size: tuple[int, int], channels: int, num_classes: int,
                 dtype, rngs: nnx.Rngs):
        self.patch, self.width, self.dtype = patch, width, dtype
        self.grid = (input_size[0] // patch, input_size[1] // patch)
        self.x_embedder = Linear((patch, patch, channels), width, dtype=dtype, rngs=rngs)
        self.t_embedder = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.y_embedder = LabelEmbedder(num_classes, width, dtype=dtype, rngs=rngs)

    def embed(self, x_BHWC: Array, t_B: Array, y_B: Array) -> tuple[Array, Array]:
        """(tokens with their positions [B, N, D], condition [B, D])."""
        x = self.x_embedder(patchify(x_BHWC, self.patch))
        return (x + position_table(self.grid, self.width).astype(self.dtype),
                constrain(self.t_embedder(t_B) + self.y_embedder(y_B), 'batch', None))

    def finish(self, x_BND: Array, c_BD: Array) -> Array:
        """Tokens -> [B, H, W, outputs]."""
        x = constrain(self.final_layer(x_BND, c_BD), 'batch', 'tokens', None)
        return constrain(unpatchify(x, self.grid, self.patch), 'batch', 'rows', None, None)


class DiT(OfClasses):
    """x_t [B, H, W, C], t [B], label [B] -> [B, H, W, 2C]: predicted noise, then the raw variance channels.

    Args:
        depth, width, patch: as in DiT's table of sizes (`lit_jax.recipes.recipe.SIZES`).
        input_size: (H, W) of the latent or image, each a multiple of `patch`; need not be square.
        channels: C. With `learn_sigma` the output has 2C channels, otherwise C.
        num_classes: label `num_classes` is the null class.
        mixer: {'name': ..., options} of `lit_jax.models.mixers`. stages: runs of blocks whose mixers differ
            in kind or options, see `stage_mixers`; the parameters of run i are then `blocks{i}`.
        ffn: a name of `lit_jax.models.ffn.FFNS`; mlp_ratio: its inner width over `width`.
        norm: 'layer', or 'rms' with a learned gain (LightningDiT). shift: whether the condition shifts the
            tokens in the blocks, beside scaling them.
        projectors: REPA's (`lit_jax.models.projectors`), or None.
        dtype: compute dtype. scan_layers, remat: see `run_stack`."""

    def __init__(self, *, depth: int, width: int, patch: int, input_size: tuple[int, int], channels: int,
                 num_classes: int, mixer: Mapping, mlp_ratio: float = 4.0, ffn: str = 'mlp',
                 stages: Sequence[Mapping] = (), learn_sigma: bool = True, norm: str = 'layer',
                 shift: bool = True, projectors: Mapping | None = None, dtype=jnp.float32,
                 scan_layers: bool = True, remat: str = 'none', rngs: nnx.Rngs):
        super().__init__(width, patch, input_size, channels, num_classes, dtype, rngs)
        self.scan_layers, self.remat = scan_layers, remat

        def make(own, rngs):
            return Block(width, mlp_ratio, own, ffn, norm, shift, dtype=dtype, rngs=rngs)

        self.stacks = add_stacks(self, make, depth, mixer, stages, rngs)
        self.final_layer = FinalLayer(width, patch, channels * (1 + learn_sigma), norm, dtype=dtype,
                                      rngs=rngs)
        self.projectors = Projectors(width, **projectors, dtype=dtype, rngs=rngs) if projectors else None

    def __call__(self, x_BHWC: Array, t_B: Array, y_B: Array) -> Array:
        """t_B: original timestep indices (0..999), integer or float. Returns the compute dtype."""
        x, c = self.embed(constrain(x_BHWC, 'batch', 'rows', None, None), t_B, y_B)
        for name in self.stacks:
            x = run_stack(getattr(self, name), x, c, self.grid, scan=self.scan_layers, remat=self.remat)
        return self.finish(x, c)
