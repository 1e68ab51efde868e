"""Softmax attention (DiT), with compressed keys (PixArt-Σ), norms of queries and keys (REPA, LightningDiT) or
rotary positions (LightningDiT) where the config says so."""
from torch import nn

from lit_jax.convert.twins.parts_twin import RmsNorm, attend
from lit_jax.convert.twins.rotary_twin import rotate

QK_NORMS = {'none': lambda size: None, 'layer': nn.LayerNorm, 'rms': RmsNorm}


class SoftmaxAttention(nn.Module):
    """One qkv projection; with compress=r the keys and values of r x r tokens become one."""

    def __init__(self, width, grid, heads, qkv_bias=True, compress=1, qk_norm='none', rope=False):
        super().__init__()
        self.heads, self.compress, self.rope = heads, compress, rope
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.q_norm, self.k_norm = (QK_NORMS[qk_norm](width // heads) for _ in range(2))
        if compress > 1:
            self.sr = nn.Conv2d(width, width, compress, compress, groups=width)
            self.norm = nn.LayerNorm(width)

    def forward(self, x, grid):
        b, n, d = x.shape
        head = self.heads, d // self.heads
        q, k, v = self.qkv(x).reshape(b, n, 3, *head).unbind(2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, grid), rotate(k, grid)
        if self.compress > 1:
            k, v = (self.shorten(a.flatten(2), grid).unflatten(-1, head) for a in (k, v))
        return self.proj(attend(q, k, v).reshape(b, n, d))

    def shorten(self, x, grid):
        image = x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
        return self.norm(self.sr(image).flatten(2).transpose(1, 2))
