"""The class-conditional backbone: DiT (arXiv 2212.09748) with the mixers of the config."""
import torch
from torch import nn

from lit_jax.convert.twins.blocks_twin import block_mixers, make_mixer
from lit_jax.convert.twins.ffn_twin import FFNS
from lit_jax.convert.twins.parts_twin import (
    Named,
    RmsNorm,
    TimestepEmbedder,
    modulate,
    position_table,
    unpatchify,
)


class Block(nn.Module):
    """x += gate·mixer(modulate(LN(x))), then x += gate·mlp(modulate(LN(x))). norm 'rms': RMSNorm with a gain;
    shift False: the condition scales and gates only."""

    def __init__(self, width, grid, mixer, ffn, ratio, norm='layer', shift=True):
        super().__init__()
        self.attn, self.mlp = make_mixer(mixer, width, grid), FFNS[ffn](width, ratio)
        self.parts = 6 if shift else 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))
        self.norm1, self.norm2 = (RmsNorm(width) if norm == 'rms' else None for _ in range(2))

    def forward(self, x, c, grid):
        parts = self.adaLN_modulation(c).chunk(self.parts, -1)
        if self.parts == 4:
            parts = None, *parts[:2], None, *parts[2:]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1, self.norm1), grid)
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2, self.norm2), grid)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs, norm='layer'):
        super().__init__()
        self.norm_final = RmsNorm(width) if norm == 'rms' else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, -1), self.norm_final))


class OfClasses(nn.Module):
    """Embedders and output of class-conditional models."""

    def __init__(self, arch):
        super().__init__()
        width, patch = arch['width'], arch['patch']
        self.patch, self.channels = patch, arch['channels']
        self.grid = tuple(side // patch for side in arch['input_size'])
        self.x_embedder = Named(proj=nn.Conv2d(self.channels, width, patch, patch))
        self.t_embedder = TimestepEmbedder(width)
        rows = arch['num_classes'] + arch.get('null_class', True)
        self.y_embedder = Named(embedding_table=nn.Embedding(rows, width))
        table = position_table(*(torch.arange(side) for side in self.grid), width)
        self.register_buffer('pos_embed', table.float()[None])

    def embed(self, x, t, y):
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        condition = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        return tokens + self.pos_embed.to(tokens.dtype), condition

    def finish(self, x, c):
        return unpatchify(self.final_layer(x, c), self.grid, self.patch)


class DiT(OfClasses):
    """x_t [B, C, H, W], t [B], labels [B] -> [B, 2C, H, W]: noise, then the raw variance; of flows the
    velocity, then channels without a meaning."""

    def __init__(self, arch):
        super().__init__(arch)
        width, outputs = arch['width'], arch['patch'] ** 2 * arch['channels'] * (1 + arch['learn_sigma'])
        norm = arch.get('norm', 'layer')
        self.blocks = nn.ModuleList(
            Block(width, self.grid, mixer, arch['ffn'], arch['mlp_ratio'], norm, arch.get('shift', True))
            for mixer in block_mixers(arch))
        self.final_layer = FinalLayer(width, outputs, norm)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c, self.grid)
        return self.finish(x, c)
