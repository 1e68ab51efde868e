"""EDiT's linear compressed attention (arXiv 2503.16726)."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.linear_twin import linear_attention
from lit_jax.convert.twins.parts_twin import Product, accumulate, depthwise, to_image, to_tokens


class HwioConv(nn.Module):
    """A convolution whose kernel is stored [k, k, in, out]."""

    def __init__(self, width_in, width_out, size):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(size, size, width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, image):
        kernel = self.kernel.permute(3, 2, 0, 1).to(image.dtype)
        return F.conv2d(image, kernel, self.bias.to(image.dtype), padding=kernel.shape[-1] // 2)


class ChannelNorm(nn.Module):
    """Group norm with a gain and a bias, in float32."""

    def __init__(self, width, groups):
        super().__init__()
        self.groups = groups
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, image):
        gain, bias = accumulate(self.gain), accumulate(self.bias)
        return F.group_norm(accumulate(image), self.groups, gain, bias, 1e-5).to(image.dtype)


class ConvFusion(nn.Module):
    """x + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(x))))."""

    def __init__(self, width, ratio, groups):
        super().__init__()
        hidden = int(width * ratio)
        self.compress, self.restore = HwioConv(width, hidden, 3), HwioConv(hidden, width, 1)
        self.norm = ChannelNorm(hidden, math.gcd(hidden, groups))

    def forward(self, image):
        return image + self.restore(F.leaky_relu(self.norm(self.compress(image)), 0.01))


class SpatialCompressor(nn.Module):
    """A Linear, then a depth-wise 3x3 convolution of stride 2."""

    def __init__(self, width, head):
        super().__init__()
        self.linear = Product((width,), head)
        self.kernel, self.bias = nn.Parameter(torch.zeros(3, 3, *head)), nn.Parameter(torch.zeros(*head))

    def forward(self, x, grid):
        y = self.linear(x).flatten(-2)
        kernel = self.kernel.flatten(2).permute(2, 0, 1)[:, None]
        return depthwise(y, kernel, self.bias.flatten(), grid, stride=2).to(x.dtype)


class EditAttention(nn.Module):
    """Linear attention of convolved queries over compressed keys and values."""

    def __init__(self, width, grid, heads, ratio=0.5, groups=32):
        super().__init__()
        head = heads, width // heads
        self.head, self.fusion = head, ConvFusion(width, ratio, groups)
        self.q, self.proj = Product((width,), head), Product(head, (width,))
        self.k, self.v = SpatialCompressor(width, head), SpatialCompressor(width, head)

    def forward(self, x, grid):
        b = len(x)
        q = self.q(to_tokens(self.fusion(to_image(x, grid))))
        k, v = (part(x, grid).reshape(b, -1, *self.head) for part in (self.k, self.v))
        return self.proj(linear_attention(accumulate(F.relu(q)), accumulate(F.relu(k)), v).to(x.dtype))
