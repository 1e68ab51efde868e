"""What all models share: projections, norms, embedders, patches. Tokens are [B, N, D], images NCHW."""
import math

import torch
import torch.nn.functional as F
from torch import nn


def accumulate(x):
    """x for sums over tokens: 16-bit numbers become float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Named(nn.Module):
    """A module under another name: Named('proj', conv) has the weights 'proj.weight' and 'proj.bias'."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Product(nn.Module):
    """A product over the last axes of x with a kernel of shape ins + outs, as lit_jax stores those that no
    official PyTorch code has."""

    def __init__(self, ins, outs, bias=True):
        super().__init__()
        self.count, self.outs = len(ins), tuple(outs)
        self.kernel = nn.Parameter(torch.zeros(*ins, *outs))
        self.bias = nn.Parameter(torch.zeros(*outs)) if bias else None

    def forward(self, x):
        lead, inner = x.shape[:x.ndim - self.count], math.prod(self.kernel.shape[:self.count])
        y = x.reshape(*lead, inner) @ self.kernel.reshape(inner, -1).to(x.dtype)
        y = y if self.bias is None else y + self.bias.reshape(-1).to(x.dtype)
        return y.reshape(*lead, *self.outs)


class RmsNorm(nn.Module):
    """x over its root mean square, with a gain, in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = accumulate(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * accumulate(self.weight)).to(x.dtype)


def modulate(x, shift, scale, norm=None):
    """LN(x)·(1 + scale) + shift (adaLN), or with another norm; in float32. shift: None for 0."""
    wide = accumulate(x)
    normed = F.layer_norm(wide, x.shape[-1:], eps=1e-6) if norm is None else norm(wide)
    scaled = normed * (1 + accumulate(scale)[:, None])
    return (scaled if shift is None else scaled + accumulate(shift)[:, None]).to(x.dtype)


def timestep_features(t, dim=256, dtype=torch.float32):
    """[cos(t·f), sin(t·f)] with f from 1 down to 1/10000."""
    steps = torch.arange(dim // 2, dtype=dtype, device=t.device)
    frequencies = torch.exp(-math.log(10000.0) * steps / (dim // 2))
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


def position_table(rows, columns, width, device=None):
    """Sines and cosines of coordinates [H·W, D] in float64: columns in the first half, rows in the second."""
    rows, columns = torch.meshgrid(rows.double(), columns.double(), indexing='ij')
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4))

    def encode(positions):
        angles = positions.reshape(-1, 1) * omega
        return torch.cat([torch.sin(angles), torch.cos(angles)], 1)

    return torch.cat([encode(columns), encode(rows)], 1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        # Features in float32: bfloat16 cannot tell t = 998 from 999.
        dtype = self.mlp[0].weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.mlp(timestep_features(t, dtype=wide).to(dtype))


def unpatchify(x, grid, patch):
    """[B, N, patch·patch·C] -> [B, C, H, W]."""
    x = x.reshape(len(x), *grid, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid[0] * patch, grid[1] * patch)


def to_image(x, grid):
    """[B, N, C] -> [B, C, H, W] in channels-last memory, the layout that convolutions run fastest in."""
    return x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)


def to_tokens(image):
    """[B, C, H, W] -> [B, N, C]."""
    return image.permute(0, 2, 3, 1).reshape(len(image), -1, image.shape[1])


def depthwise(x, kernel, bias, grid, stride=1):
    """Tokens [B, N, C] convolved with one kernel a channel, [C, 1, k, k], zeros around, sums in float32."""
    kernel, bias = kernel.to(accumulate(x).dtype), bias.to(accumulate(x).dtype)
    image, padding = to_image(accumulate(x), grid), kernel.shape[-1] // 2
    return to_tokens(F.conv2d(image, kernel, bias, stride, padding, groups=x.shape[-1]))


def attend(q, k, v):
    """softmax(q·kᵀ/√E)·v of [B, N, K, E]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
