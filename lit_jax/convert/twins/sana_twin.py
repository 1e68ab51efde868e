"""Sana's linear attention (arXiv 2410.10629)."""
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.linear_twin import linear_attention
from lit_jax.convert.twins.parts_twin import accumulate


class SanaAttention(nn.Module):
    """o = relu(q)·(relu(k)ᵀv) / (relu(q)·Σ relu(k) + eps), then proj."""

    def __init__(self, width, grid, heads, qkv_bias=False, eps=1e-8):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)

    def forward(self, x, grid):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).unbind(2)
        o = linear_attention(accumulate(F.relu(q)), accumulate(F.relu(k)), v, self.eps / n)
        return self.proj(o.reshape(b, n, d).to(x.dtype))
