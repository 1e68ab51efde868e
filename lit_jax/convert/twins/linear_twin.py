"""LiT's linear attention (arXiv 2501.12976, Algorithm 1)."""
import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.parts_twin import accumulate, depthwise
from lit_jax.convert.twins.rotary_twin import rotate

EPS = 1e-6


def linear_attention(q, k, v, eps=EPS, grid=None):
    """q·(kᵀv/N) / (q·mean(k) + eps) of [B, N, K, E], sums in float32. Costs N·E², not N²·E. grid: q and k are
    turned by their positions in it, in the numerator."""
    turned = (q, k) if grid is None else (rotate(q, grid), rotate(k, grid))
    q, k, v, turned_q, turned_k = (x.transpose(1, 2) for x in (q, k, accumulate(v), *turned))
    state = turned_k.transpose(-1, -2) @ v / k.shape[2]
    o = (turned_q @ state) / ((q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + eps)
    return o.transpose(1, 2)


class LinearAttention(nn.Module):
    """o = φ(q)·(φ(k)ᵀv / N) / (φ(q)·mean φ(k)) + dwc(v), then proj."""

    def __init__(self, width, grid, heads, qkv_bias=False, dwc_kernel=5, activation='relu', focus_power=0,
                 focus_scale=False, key_grid=None, rope=False):
        super().__init__()
        self.heads, self.activation, self.focus_power, self.rope = heads, activation, focus_power, rope
        size = width // heads
        self.q, self.kv = nn.Linear(width, width, bias=qkv_bias), nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dwc = nn.Conv2d(size, size, dwc_kernel, groups=size) if dwc_kernel else None
        self.focus_scale = nn.Parameter(torch.zeros(heads, size)) if focus_scale else None
        self.key_table = None
        if key_grid:
            self.key_table = nn.Parameter(torch.zeros(key_grid[0] * key_grid[1], heads, size))

    def forward(self, x, grid):
        b, n, d = x.shape
        head = b, n, self.heads, d // self.heads
        k, v = (a.reshape(head) for a in self.kv(x).chunk(2, -1))
        q, k = self.features(self.q(x).reshape(head)), self.features(k, self.key_table)
        o = linear_attention(q, k, v, grid=grid if self.rope else None)
        if self.dwc is not None:      # one kernel a channel of a head, shared by the heads
            kernel, bias = self.dwc.weight.repeat(self.heads, 1, 1, 1), self.dwc.bias.repeat(self.heads)
            o = o + depthwise(v.reshape(b, n, d), kernel, bias, grid).reshape(head)
        return self.proj(o.reshape(b, n, d).to(x.dtype))

    def features(self, x, table=None):
        x = accumulate(x) if table is None else accumulate(x) + accumulate(table)
        x = (F.relu(x) if self.activation == 'relu' else F.gelu(x)) + EPS
        if self.focus_scale is not None:
            x = x / F.softplus(accumulate(self.focus_scale))
        return focus(x, self.focus_power) if self.focus_power else x


def focus(x, power):
    """x^p with the norm of x, over all heads (FLatten, eq. 5)."""
    powered = (x / x.amax((-2, -1), keepdim=True)) ** power
    return powered * (x.flatten(-2).norm(dim=-1) / powered.flatten(-2).norm(dim=-1))[..., None, None]
