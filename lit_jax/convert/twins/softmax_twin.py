"""Softmax attention (DiT), with compressed keys (PixArt-Σ) where the file says so."""
from torch import nn

from lit_jax.convert.twins.parts_twin import attend


class SoftmaxAttention(nn.Module):
    """One qkv projection; with compress=r the keys and values of r x r tokens become one."""

    def __init__(self, width, grid, heads, qkv_bias=True, compress=1, qk_norm='none', rope=False):
        super().__init__()
        self.heads, self.compress = heads, compress
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        if compress > 1:
            self.sr = nn.Conv2d(width, width, compress, compress, groups=width)
            self.norm = nn.LayerNorm(width)

    def forward(self, x, grid):
        b, n, d = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.compress > 1:
            k, v = (self.shorten(a, grid) for a in (k, v))
        o = attend(*(a.reshape(b, -1, self.heads, d // self.heads) for a in (q, k, v)))
        return self.proj(o.reshape(b, n, d))

    def shorten(self, x, grid):
        image = x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
        return self.norm(self.sr(image).flatten(2).transpose(1, 2))
