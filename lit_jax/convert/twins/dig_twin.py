"""DiG (arXiv 2405.18428): blocks that read their tokens in alternating orders."""
import torch
from torch import nn

from lit_jax.convert.twins.dit_twin import Block, FinalLayer, OfClasses
from lit_jax.convert.twins.gla_twin import transpose_tokens
from lit_jax.convert.twins.parts_twin import depthwise

# order: parities of the blocks after which (tokens are reversed, the grid is transposed)
ORDERS = {'official': ({0, 1}, {1}), 'algorithm1': (set(), {0}), 'algorithm4': ({0}, {1}),
          'bidirectional': ({0, 1}, set()), 'causal': (set(), set())}


class Walk:
    """The order of the tokens along the blocks."""

    def __init__(self, grid, order):
        self.grid, (self.reversed, self.transposed) = tuple(grid), ORDERS[order]

    def grid_at(self, i):
        return self.grid[::-1] if self.odd(self.transposed, i) else self.grid

    def turn(self, x, i):
        """Output of block i -> input of the next one."""
        x = x.flip(1) if i % 2 in self.reversed else x
        return transpose_tokens(x, self.grid_at(i)) if i % 2 in self.transposed else x

    def back(self, x, i):
        """Tokens in the order of block i -> rows first."""
        x = transpose_tokens(x, self.grid[::-1]) if self.odd(self.transposed, i) else x
        return x.flip(1) if self.odd(self.reversed, i) else x

    def forth(self, x, i):
        x = transpose_tokens(x, self.grid) if self.odd(self.transposed, i) else x
        return x.flip(1) if self.odd(self.reversed, i) else x

    @staticmethod
    def odd(parities, i):
        return sum(k % 2 in parities for k in range(i)) % 2 == 1


class DiGBlock(Block):
    """DiT's block, then a 3x3 depth-wise convolution that replaces x."""

    def __init__(self, width, grid, mixer, ffn, ratio, local):
        super().__init__(width, grid, mixer, ffn, ratio)
        self.dw_conv = None if local == 'none' else nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x, c, grid):
        x = super().forward(x, c, grid)
        return x if self.dw_conv is None else depthwise(x, self.dw_conv.weight, self.dw_conv.bias,
                                                        grid).to(x.dtype)


class DiG(OfClasses):
    def __init__(self, arch):
        super().__init__(arch)
        width, outputs = arch['width'], arch['patch'] ** 2 * arch['channels'] * (1 + arch['learn_sigma'])
        self.order, depth = arch.get('order', 'official'), arch['depth']
        self.blocks = nn.ModuleList(
            DiGBlock(width, self.grid, arch['mixer'], arch['ffn'], arch['mlp_ratio'],
                     arch.get('local', 'identity')) for _ in range(depth))
        joined = max((depth - 1) // 2, 0) if depth % 2 else max(depth // 2 - 1, 0)
        self.joined = joined if arch.get('skip', 'none') != 'none' else 0
        for block in self.blocks[depth - self.joined:]:
            block.skip_linear = nn.Linear(2 * width, width)
        self.final_layer = FinalLayer(width, outputs)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        walk, skips, depth = Walk(self.grid, self.order), [], len(self.blocks)
        for i, block in enumerate(self.blocks):
            if i >= depth - self.joined:
                x = block.skip_linear(torch.cat([x, skips.pop()], -1))
            x = walk.turn(block(x, c, walk.grid_at(i)), i)
            if i < self.joined:
                skips.append(x)
        return self.finish(walk.back(x, depth), c)
