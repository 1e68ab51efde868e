"""Feed-forward networks of the blocks."""
import math

import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.parts_twin import Named, to_image, to_tokens


class Mlp(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, int(width * ratio)), nn.Linear(int(width * ratio), width)

    def forward(self, x, grid):
        return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


class SwiGlu(nn.Module):
    """DiG's: down(silu(gate)·y), two thirds as wide, rounded up to 256."""

    def __init__(self, width, ratio):
        super().__init__()
        hidden = 256 * math.ceil(int(width * ratio * 2 / 3) / 256)
        self.gate_proj, self.down_proj = (nn.Linear(width, 2 * hidden, bias=False),
                                          nn.Linear(hidden, width, bias=False))

    def forward(self, x, grid):
        gate, y = self.gate_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * y)


class BiasedSwiGlu(nn.Module):
    """LightningDiT's: w3(silu(gate)·y), (gate, y) = w12(x), two thirds as wide, with biases."""

    def __init__(self, width, ratio):
        super().__init__()
        hidden = int(2 / 3 * int(width * ratio))
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x, grid):
        gate, y = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * y)


class MixFfn(nn.Module):
    """Sana's Mix-FFN, whose tokens see their eight neighbours."""

    def __init__(self, width, ratio):
        super().__init__()
        hidden = int(width * ratio)
        self.inverted_conv = Named(conv=nn.Conv2d(width, 2 * hidden, 1))
        self.depth_conv = Named(conv=nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden))
        self.point_conv = Named(conv=nn.Conv2d(hidden, width, 1, bias=False))

    def forward(self, x, grid):
        hidden = F.silu(self.inverted_conv.conv(to_image(x, grid)))
        value, gate = self.depth_conv.conv(hidden).chunk(2, 1)
        return to_tokens(self.point_conv.conv(value * F.silu(gate)))


FFNS = {'mlp': Mlp, 'swiglu': SwiGlu, 'swiglu_bias': BiasedSwiGlu, 'mix': MixFfn}
