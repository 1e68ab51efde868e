"""Mixture-of-head attention (MoH, arXiv 2410.11842)."""
import torch
from torch import nn

from lit_jax.convert.twins.parts_twin import accumulate, attend


class MohAttention(nn.Module):
    """proj(Σ over heads of weight·attention); the weights are a function of the token."""

    def __init__(self, width, grid, heads, shared, routed, head_dim=None, qkv_bias=True):
        super().__init__()
        self.heads, self.size = heads, head_dim or width // heads
        self.shared, self.routed, experts = shared, routed, heads - shared
        inner = self.heads * self.size
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=qkv_bias), nn.Linear(inner, width)
        self.wg = nn.Linear(width, experts, bias=False) if experts else None
        self.wg_0 = nn.Linear(width, 2, bias=False) if shared and experts else None
        self.wg_1 = nn.Linear(width, shared, bias=False) if shared > 1 else None

    def forward(self, x, grid):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).unbind(2)
        weighted = attend(q, k, v) * self.head_weights(x)[..., None]
        return self.proj(weighted.flatten(-2).to(x.dtype))

    def head_weights(self, x):
        """Weights of the heads [B, N, K], in float32: in 16 bit the best heads would often be equal."""
        x, parts = accumulate(x), []

        def probabilities(router):
            return (x @ accumulate(router.weight).T).softmax(-1)

        if self.shared:
            parts.append(x.new_ones(*x.shape[:2], 1) if self.wg_1 is None
                         else probabilities(self.wg_1) * self.shared)
        if self.wg is not None:
            p = probabilities(self.wg)
            kept = torch.zeros_like(p).scatter(-1, p.topk(self.routed, -1).indices, 1.0) * p
            parts.append(kept / kept.sum(-1, keepdim=True) * self.routed)
        if self.wg_0 is not None:
            kinds = probabilities(self.wg_0) * 2
            parts = [part * kinds[..., i:i + 1] for i, part in enumerate(parts)]
        return torch.cat(parts, -1)
