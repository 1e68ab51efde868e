"""U-DiG (arXiv 2405.18428): DiG blocks in the shape of a U-Net."""
import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.dig_twin import Walk
from lit_jax.convert.twins.dit_twin import Block, FinalLayer, OfClasses
from lit_jax.convert.twins.parts_twin import Product, depthwise

STAGES = 0, 1, 2, 1, 0      # of the five groups; each stage is twice as wide and half as high


class TailedBlock(Block):
    """DiT's block, then a 3x3 depth-wise convolution that replaces x; its kernel is stored [3, 3, 1, D]."""

    def __init__(self, width, grid, mixer, ffn, ratio, local):
        super().__init__(width, grid, mixer, ffn, ratio)
        self.dwc = None if local == 'none' else Product((3, 3, 1), (width,))

    def forward(self, x, c, grid):
        x = super().forward(x, c, grid)
        if self.dwc is None:
            return x
        return depthwise(x, self.dwc.kernel.permute(3, 2, 0, 1), self.dwc.bias, grid).to(x.dtype)


class UDiG(OfClasses):
    def __init__(self, arch):
        super().__init__(arch)
        width, outputs = arch['width'], arch['patch'] ** 2 * arch['channels'] * (1 + arch['learn_sigma'])
        self.order, self.group = arch.get('order', 'official'), arch['depth'] // 5
        self.grids = [tuple(side // 2 ** stage for side in self.grid) for stage in range(3)]
        self.blocks = nn.ModuleList(
            TailedBlock(width << stage, self.grids[stage],
                        {**arch['mixer'], 'heads': arch['mixer']['heads'] << stage}, arch['ffn'],
                        arch['mlp_ratio'], arch.get('local', 'identity'))
            for stage in STAGES for _ in range(self.group))
        for stage in (1, 2):
            wide, narrow = width << stage, width << stage - 1
            setattr(self, f'down{stage}', Product((2, 2, narrow), (wide,)))
            setattr(self, f'up{stage}', Product((wide,), (2, 2, narrow)))
            setattr(self, f'condition{stage + 1}', Product((width,), (wide,)))
            joins = nn.Module()
            joins.kernel = nn.Parameter(torch.zeros(self.group, 2 * narrow, narrow))
            joins.bias = nn.Parameter(torch.zeros(self.group, narrow))
            setattr(self, f'joins{6 - stage}', joins)
        self.final_layer = FinalLayer(width, outputs)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        conditions, skips = [c, self.condition2(c), self.condition3(c)], {}
        for stage in (0, 1):
            x, skips[stage] = self.run(stage, stage, x, conditions[stage])
            x = getattr(self, f'down{stage + 1}')(self.cut(x, self.grids[stage]))
        x, _ = self.run(2, 2, x, conditions[2])
        for stage in (1, 0):
            x = self.join_up(getattr(self, f'up{stage + 1}')(x), self.grids[stage + 1])
            joins = getattr(self, f'joins{5 - stage}')
            x, _ = self.run(4 - stage, stage, x, conditions[stage], skips[stage], joins)
        return self.finish(x, c)

    def run(self, group, stage, x, c, skips=None, joins=None):
        """(x after one group of blocks, the outputs of its blocks), rows first."""
        walk, outputs = Walk(self.grids[stage], self.order), []
        for i, block in enumerate(self.blocks[group * self.group:(group + 1) * self.group]):
            if joins is not None:
                both = torch.cat([x, walk.forth(skips[-1 - i], i)], -1)
                x = F.linear(both, joins.kernel[i].T.to(x.dtype), joins.bias[i].to(x.dtype))
            y = block(x, c, walk.grid_at(i))
            outputs.append(walk.back(y, i))
            x = walk.turn(y, i)
        return walk.back(x, self.group), outputs

    @staticmethod
    def cut(x, grid):
        """Tokens -> those of 2 x 2 neighbours, [B, N/4, 2, 2, D]."""
        x = x.reshape(len(x), grid[0] // 2, 2, grid[1] // 2, 2, -1)
        return x.transpose(2, 3).reshape(len(x), -1, 2, 2, x.shape[-1])

    @staticmethod
    def join_up(x, grid):
        """[B, N, 2, 2, D] of a grid -> [B, 4N, D] of one twice as high."""
        x = x.reshape(len(x), *grid, 2, 2, -1).transpose(2, 3)
        return x.reshape(len(x), -1, x.shape[-1])
