"""U-DiG (arXiv 2405.18428, figure 5b and Table 2): DiG blocks in the shape of a U-Net.

From the paper: patch 1, three stages on grids of 1, 1/2 and 1/4 of the side, N blocks in five groups of N/5
(two encoders, the middle, two decoders), down-sampling and up-sampling between stages, skips by concatenation
within stages 1 and 2, a linear head. No code was published; decisions of this library:

- widths D, 2D, 4D of the stages; heads of the same width everywhere, so their number doubles too. With D of
  the paper's sizes (128, 256, 320, 416) heads of 32 value channels are the widest: 4, 8, 10, 13 heads.
- down: the four tokens of a 2 x 2 patch to one, a Linear(4w, 2w); up: a Linear(2w, 4w) back to four tokens.
- every decoder block has a Linear(2w, w) on its input joined with the output of the mirrored encoder block
  (last first), as the -skip models of DiG's code; here tokens are first put in the order of that block.
- conditions: one embedding of width D for t and label, and a Linear to the width of stages 2 and 3;
  adaLN-Zero per block. Positions are added once, at stage 1.
- blocks, norms, SwiGLU (hidden widths rounded up to 256) and head are DiG's.

Billions of multiply-accumulates at 32 x 32 x 4, counted as in the paper (without the SwiGLU's second product
and the recurrence), against Table 2: S 4.10 / 4.10, B 15.06 / 15.20, L 46.22 / 53.57, XL 77.03 / 79.09. No
rule with fixed multiples of D fits both L and XL: they differ by a factor of 1.48 in the table, their widths
squared by 1.69."""
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lit_jax.models.dig import Walk, build_blocks, check_dig, run_blocks
from lit_jax.models.dit import FinalLayer, OfClasses
from lit_jax.models.layers import Array, Linear, build_stack, patchify, unpatchify
from lit_jax.runtime.errors import UserError

GROUPS = 5
MULTIPLES = (1, 2, 4)       # width of a stage over that of the first
STAGES = (0, 1, 2, 1, 0)    # of the groups


def check_udig(arch: Mapping) -> None:
    """UserError for fields that no U-DiG can have."""
    check_dig(arch)
    if arch['depth'] % GROUPS:
        raise UserError(f'model.depth {arch["depth"]} is not divisible by {GROUPS}, the groups of a U-DiG')
    grid = tuple(side // arch['patch'] for side in arch['input_size'])
    if any(side % 4 for side in grid):
        raise UserError(f'a U-DiG halves its grid twice, and {grid[0]} x {grid[1]} tokens are no multiples '
                        f'of 4; choose another input size or patch')


def _join(width: int, dtype, rngs: nnx.Rngs) -> Linear:
    return Linear(2 * width, width, dtype=dtype, rngs=rngs)


class UDiG(OfClasses):
    """x_t [B, H, W, C], t [B], label [B] -> [B, H, W, 2C]; arguments as for `lit_jax.models.dig.DiG`.

    Parameters: the groups are blocks1 ... blocks5 in order, joins4 and joins5 the Linears of the skips."""

    condition2: Linear
    condition3: Linear

    def __init__(self, *, depth: int, width: int, patch: int, input_size: tuple[int, int], channels: int,
                 num_classes: int, mixer: Mapping, mlp_ratio: float = 4.0, ffn: str = 'swiglu',
                 order: str = 'official', local: str = 'identity', learn_sigma: bool = True,
                 dtype=jnp.float32, scan_layers: bool = True, remat: str = 'none', rngs: nnx.Rngs):
        super().__init__(width, patch, input_size, channels, num_classes, dtype, rngs)
        self.order = order
        self.loop: dict[str, Any] = {'scan': scan_layers, 'remat': remat}
        group, widths = depth // GROUPS, [width * multiple for multiple in MULTIPLES]
        for number, stage in enumerate(STAGES, start=1):
            own = {**mixer, 'heads': mixer['heads'] * MULTIPLES[stage]}
            setattr(self, f'blocks{number}',
                    build_blocks(group, widths[stage], mlp_ratio, own, ffn, local, dtype, rngs))
        for stage, (wide, narrow) in enumerate(zip(widths[1:], widths[:-1], strict=True), start=1):
            setattr(self, f'down{stage}', Linear((2, 2, narrow), wide, dtype=dtype, rngs=rngs))
            setattr(self, f'up{stage}', Linear(wide, (2, 2, narrow), dtype=dtype, rngs=rngs))
            setattr(self, f'condition{stage + 1}', Linear(width, wide, dtype=dtype, rngs=rngs))
            setattr(self, f'joins{6 - stage}',
                    build_stack(functools.partial(_join, narrow, dtype), group, rngs))
        self.final_layer = FinalLayer(width, patch, channels * (1 + learn_sigma), dtype=dtype, rngs=rngs)

    @staticmethod
    def mixing_layers(arch: Mapping) -> list[tuple[int, dict, int, tuple[int, int]]]:
        """[(layers, mixer, width, grid)] of the five groups, see `lit_jax.models.arch`."""
        return [(arch['depth'] // GROUPS,
                 {**arch['mixer'], 'heads': arch['mixer']['heads'] * MULTIPLES[stage]},
                 arch['width'] * MULTIPLES[stage],
                 tuple(side // arch['patch'] // 2 ** stage for side in arch['input_size']))
                for stage in STAGES]

    def __call__(self, x_BHWC: Array, t_B: Array, y_B: Array) -> Array:
        """t_B: original timestep indices (0..999), integer or float. Returns the compute dtype."""
        x, c = self.embed(x_BHWC, t_B, y_B)
        conditions = {1: c, 2: self.condition2(c), 3: self.condition3(c)}
        grids = {stage: tuple(side // 2 ** (stage - 1) for side in self.grid) for stage in (1, 2, 3)}
        skips = {}
        for stage in (1, 2):
            x, skips[stage] = self._group(stage, x, conditions[stage], grids[stage])
            x = getattr(self, f'down{stage}')(patchify(x.reshape(x.shape[0], *grids[stage], -1), 2))
        x, _ = self._group(3, x, conditions[3], grids[3])
        for stage in (2, 1):
            x = getattr(self, f'up{stage}')(x)
            image = unpatchify(x.reshape(*x.shape[:2], -1), grids[stage + 1], 2)
            x = image.reshape(x.shape[0], 4 * x.shape[1], -1)
            x, _ = self._group(6 - stage, x, conditions[stage], grids[stage], skips[stage][::-1])
        return self.finish(x, c)

    def _group(self, number: int, x: Array, c: Array, grid: tuple[int, int], skips: Array | None = None):
        """(x after one group, rows first; of the encoders also the outputs of their blocks)."""
        blocks, walk = getattr(self, f'blocks{number}'), Walk(grid, self.order)
        joins = None if skips is None else getattr(self, f'joins{number}')
        return run_blocks(blocks, x, c, walk, skips=skips, joins=joins, keep=number < 3, aligned=True,
                          **self.loop)
