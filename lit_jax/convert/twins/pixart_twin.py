"""The text-to-image backbone: PixArt-Σ (arXiv 2403.04692) with the mixers of the config."""
import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.blocks_twin import block_mixers, make_mixer
from lit_jax.convert.twins.ffn_twin import FFNS
from lit_jax.convert.twins.parts_twin import Named, TimestepEmbedder, modulate, position_table, unpatchify


class CrossAttention(nn.Module):
    """Queries from the image, keys and values from the caption; padding is masked."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.q_linear = heads, nn.Linear(width, width)
        self.kv_linear, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, y, mask):
        def split(a):
            return a.reshape(*a.shape[:2], self.heads, -1).transpose(1, 2)

        k, v = self.kv_linear(y).chunk(2, -1)
        allowed = None if mask is None else (mask != 0)[:, None, None, :]
        o = F.scaled_dot_product_attention(split(self.q_linear(x)), split(k), split(v), attn_mask=allowed)
        return self.proj(o.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    def __init__(self, width, grid, mixer, ffn, ratio, cross_heads):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn, self.mlp = make_mixer(mixer, width, grid), FFNS[ffn](width, ratio)
        self.cross_attn = CrossAttention(width, cross_heads)

    def forward(self, x, t, y, mask, grid):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + t).unbind(1)
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1), grid)
        x = x + self.cross_attn(x, y, mask)
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2), grid)


class TextFinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, t):
        return self.linear(modulate(x, *(self.scale_shift_table + t[:, None]).unbind(1)))


class CaptionEmbedder(nn.Module):
    def __init__(self, channels, width, tokens):
        super().__init__()
        self.y_proj = Named(fc1=nn.Linear(channels, width), fc2=nn.Linear(width, width))
        self.register_buffer('y_embedding', torch.zeros(tokens, channels))     # of the empty caption

    def forward(self, y):
        return self.y_proj.fc2(F.gelu(self.y_proj.fc1(y), approximate='tanh'))


class PixArt(nn.Module):
    """x_t [B, C, H, W], t [B], caption features [B, L, Cy], mask [B, L] -> [B, 2C, H, W]."""

    def __init__(self, arch):
        super().__init__()
        width, patch = arch['width'], arch['patch']
        self.arch, self.patch, self.channels = arch, patch, arch['channels']
        grid = tuple(side // patch for side in arch['input_size'])
        self.x_embedder = Named(proj=nn.Conv2d(self.channels, width, patch, patch))
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(arch['caption_channels'], width, arch['caption_tokens'])
        self.blocks = nn.ModuleList(
            TextBlock(width, grid, mixer, arch['ffn'], arch['mlp_ratio'], arch['cross_heads'])
            for mixer in block_mixers(arch))
        self.final_layer = TextFinalLayer(width, patch ** 2 * self.channels * (1 + arch['learn_sigma']))

    def forward(self, x, t, y, mask=None):
        grid = tuple(side // self.patch for side in x.shape[2:])
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        x = x + self.positions(grid, x.device).to(x.dtype)
        t = self.t_embedder(t)
        t6, y = self.t_block(t).reshape(len(t), 6, -1), self.y_embedder(y)
        for block in self.blocks:
            x = block(x, t6, y, mask, grid)
        return unpatchify(self.final_layer(x, t), grid, self.patch)

    def positions(self, grid, device):
        base, interpolation = self.arch['base_size'], self.arch['pe_interpolation']
        rows, columns = (torch.arange(side, dtype=torch.float32, device=device) / (side / base)
                         / interpolation for side in grid)
        return position_table(rows, columns, self.arch['width'], device)
