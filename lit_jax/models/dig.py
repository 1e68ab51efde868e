"""DiG (arXiv 2405.18428): a DiT with gated linear attention, its blocks reading in alternating orders.

Each block reads its tokens in one order. After its ffn comes the paper's SREM: a 3 x 3 depth-wise convolution
that replaces x (no residual; it starts as the identity), then the tokens are reordered. As in the official
code (`order='official'`) they are reversed after every block and the grid is transposed after every second
one: four blocks read rows forwards, rows backwards, columns forwards, columns backwards. The paper's listings
differ: Algorithm 1 transposes after even blocks and never reverses ('algorithm1'), Algorithm 4 reverses after
even blocks only ('algorithm4'); neither reads in four directions. Table 3 has a block without reordering
('causal') and with reversals alone ('bidirectional'). At the end the original order is restored at any depth.

Norms are DiT's LayerNorm (official code; the paper's figure 5 draws RMSNorm)."""
import functools
import operator
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import fan_in_uniform
from lit_jax.models.dit import Block, FinalLayer, OfClasses
from lit_jax.models.layers import REMAT_POLICIES, Array, Linear, build_stack, xavier_uniform
from lit_jax.models.mixers.depthwise import depthwise_conv
from lit_jax.models.mixers.gla import transpose_tokens
from lit_jax.models.partition import constrain
from lit_jax.runtime.errors import UserError, shown

PERIOD = 4      # blocks after which every order is back at its start
# order -> parities of the blocks after which (tokens are reversed, the grid is transposed)
ORDERS = {'official': ({0, 1}, {1}), 'algorithm1': ((), {0}), 'algorithm4': ({0}, {1}),
          'bidirectional': ({0, 1}, ()), 'causal': ((), ())}
LOCALS = ('identity', 'uniform', 'none')
SKIPS = ('none', 'skip', 'skipzero')


def check_dig(arch: Mapping) -> None:
    """Raises UserError for fields that no DiG can have."""
    for name, known in (('order', ORDERS), ('local', LOCALS), ('skip', SKIPS)):
        if name in arch and arch[name] not in known:
            raise UserError(f'unknown model.{name} {shown(arch[name])}; known: {", ".join(known)}')
    if arch['mixer'].get('name') != 'gla':
        raise UserError(f'a model of family {shown(arch["family"])} has the mixer gla, not '
                        f"{shown(arch['mixer'].get('name'))}; any mixer fits into family 'dit'")


class LocalConv(nnx.Module):
    """3 x 3 depth-wise convolution of all channels on the grid; kernel [3, 3, 1, D], bias [D]."""

    def __init__(self, width: int, start: str, *, rngs: nnx.Rngs):
        kernel = fan_in_uniform(rngs.params(), (3, 3, 1), (width,))
        if start == 'identity':
            kernel = jnp.zeros_like(kernel).at[1, 1].set(1)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        image = x_BND.reshape(x_BND.shape[0], *grid, 1, x_BND.shape[-1])
        kernel, bias = (param[...].astype(x_BND.dtype) for param in (self.kernel, self.bias))
        return depthwise_conv(image, kernel, bias).reshape(x_BND.shape)


class DiGBlock(nnx.Module):
    """DiT's block followed by the convolution, which replaces x. Tokens are reordered outside."""

    def __init__(self, width: int, mlp_ratio: float, mixer: Mapping, ffn: str, local: str, *, dtype,
                 rngs: nnx.Rngs):
        block = Block(width, mlp_ratio, mixer, ffn, dtype=dtype, rngs=rngs)
        self.attn, self.mlp, self.adaLN = block.attn, block.mlp, block.adaLN
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.dwc = None if local == 'none' else LocalConv(width, local, rngs=rngs)

    def __call__(self, x_BND: Array, c_BD: Array, grid: tuple[int, int]) -> Array:
        x_BND = Block.__call__(cast(Block, self), x_BND, c_BD, grid)      # its own fields, no subclass
        return x_BND if self.dwc is None else self.dwc(x_BND, grid)


def build_blocks(depth: int, width: int, mlp_ratio: float, mixer: Mapping, ffn: str, local: str, dtype,
                 rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks with their parameters on a leading axis."""
    return build_stack(lambda rngs: DiGBlock(width, mlp_ratio, mixer, ffn, local, dtype=dtype, rngs=rngs),
                       depth, rngs)


def halves_to_one(key, in_shape, out_shape):
    """[I | 0]: passes the first half on and ignores the second."""
    return jnp.concatenate([jnp.eye(*out_shape), jnp.zeros((in_shape[0] - out_shape[0], *out_shape))])


class Walk:
    """The order of the tokens along the blocks: the grid of block i, and the reordering of its output."""

    def __init__(self, grid: tuple[int, int], order: str):
        self.grid = grid
        self.reversed, self.transposed = ORDERS[order]

    def grid_at(self, i: int) -> tuple[int, int]:
        """The grid of block i; i may be taken modulo PERIOD."""
        return self.grid[::-1] if self._odd(self.transposed, i) else self.grid

    def turn(self, x_BND: Array, i: int) -> Array:
        """Output of block i -> input of the next one."""
        x_BND = x_BND[:, ::-1] if i % 2 in self.reversed else x_BND
        return transpose_tokens(x_BND, self.grid_at(i)) if i % 2 in self.transposed else x_BND

    def back(self, x_BND: Array, i: int) -> Array:
        """Tokens in the order of block i -> rows first. Reversing and transposing commute."""
        x_BND = transpose_tokens(x_BND, self.grid[::-1]) if self._odd(self.transposed, i) else x_BND
        return x_BND[:, ::-1] if self._odd(self.reversed, i) else x_BND

    def forth(self, x_BND: Array, i: int) -> Array:
        """Tokens with rows first -> in the order of block i."""
        x_BND = transpose_tokens(x_BND, self.grid) if self._odd(self.transposed, i) else x_BND
        return x_BND[:, ::-1] if self._odd(self.reversed, i) else x_BND

    @staticmethod
    def _odd(parities, i: int) -> bool:
        return sum(k % 2 in parities for k in range(i)) % 2 == 1


def run_blocks(blocks: nnx.Module, x: Array, c: Array, walk: Walk, *, first: int = 0, last: int | None = None,
               skips=None, joins: nnx.Module | None = None, keep: bool = False, aligned: bool = False,
               scan: bool = True, remat: str = 'none') -> tuple[Array, Any]:
    """Blocks first ... last - 1 of a stack: (x after them, with `keep` their outputs [blocks, B, N, D]).

    Args:
        skips, joins: features [blocks, B, N, D] and a stack of Linear(2D, D) that adds them to the inputs.
        aligned: outputs, skips and the final x have rows first; otherwise outputs have the order of the next
            block, and skips are used as they are.
        scan: compiles PERIOD blocks and loops over them; the remaining blocks are unrolled.
        remat: each block is recomputed by itself in the gradient."""
    graphdef, params = nnx.split(blocks)
    last = jax.tree.leaves(params)[0].shape[0] if last is None else last
    layers: dict = {'block': jax.tree.map(lambda p: p[first:last], params)}
    join_graph = None
    if joins is not None:
        join_graph, layers['join'] = nnx.split(joins)
        layers['skip'] = skips

    def one(x, layer, i):
        if join_graph is not None:
            skip = walk.forth(layer['skip'], i) if aligned else layer['skip']
            x = nnx.merge(join_graph, layer['join'])(jnp.concatenate([x, skip], -1))
        return nnx.merge(graphdef, layer['block'])(x, c, walk.grid_at(i))

    def several(x, layers, count, start):
        outputs = []
        for k in range(count):
            step, i = functools.partial(one, i=start + k), start + k
            if remat != 'none':
                step = jax.checkpoint(step, policy=REMAT_POLICIES[remat])
            y = step(x, jax.tree.map(operator.itemgetter(k), layers))
            x = walk.turn(y, i)
            if keep:
                outputs.append(walk.back(y, i) if aligned else x)
        return x, jnp.stack(outputs) if keep else None

    count = last - first
    loops = count // PERIOD if scan else 0
    collected: list[Any] = []
    if loops:
        groups = jax.tree.map(lambda p: p[:loops * PERIOD].reshape(loops, PERIOD, *p.shape[1:]), layers)
        x, outputs = jax.lax.scan(lambda x, group: several(x, group, PERIOD, first), x, groups)
        collected.append(outputs.reshape(-1, *outputs.shape[2:]) if keep else None)
    if rest := count - loops * PERIOD:
        x, outputs = several(x, jax.tree.map(lambda p: p[loops * PERIOD:], layers), rest,
                             first + loops * PERIOD)
        collected.append(outputs)
    return walk.back(x, last) if aligned else x, jnp.concatenate(collected) if keep else None


class DiG(OfClasses):
    """x_t [B, H, W, C], t [B], label [B] -> [B, H, W, 2C], as `lit_jax.models.dit.DiT`.

    Args (further ones as for DiT):
        order: a key of ORDERS.
        local: initialisation of the depth-wise convolution, 'identity' or 'uniform'; 'none' leaves it out.
        skip: 'skip' joins the outputs of the first half of the blocks, last first, to the inputs of the
            second half by a Linear(2D, D); 'skipzero' does so with Linears that ignore them at the start. As
            in the official code the joined tokens are not reordered for the later block."""

    def __init__(self, *, depth: int, width: int, patch: int, input_size: tuple[int, int], channels: int,
                 num_classes: int, mixer: Mapping, mlp_ratio: float = 4.0, ffn: str = 'swiglu',
                 order: str = 'official', local: str = 'identity', skip: str = 'none',
                 learn_sigma: bool = True, dtype=jnp.float32, scan_layers: bool = True, remat: str = 'none',
                 rngs: nnx.Rngs):
        super().__init__(width, patch, input_size, channels, num_classes, dtype, rngs)
        self.depth, self.order, self.skip = depth, order, skip
        self.loop: dict[str, Any] = {'scan': scan_layers, 'remat': remat}
        self.blocks = build_blocks(depth, width, mlp_ratio, mixer, ffn, local, dtype, rngs)
        if skip != 'none' and self._joined():
            init = halves_to_one if skip == 'skipzero' else xavier_uniform
            self.joins = build_stack(lambda rngs: Linear(2 * width, width, init=init, dtype=dtype, rngs=rngs),
                                     self._joined(), rngs)
        self.final_layer = FinalLayer(width, patch, channels * (1 + learn_sigma), dtype=dtype, rngs=rngs)

    def _joined(self) -> int:
        """How many blocks i > depth/2 are joined, each with an output of a block i < depth/2 - 1."""
        return max((self.depth - 1) // 2, 0) if self.depth % 2 else max(self.depth // 2 - 1, 0)

    def __call__(self, x_BHWC: Array, t_B: Array, y_B: Array) -> Array:
        """t_B: original timestep indices (0..999), integer or float. Returns the compute dtype."""
        x, c = self.embed(constrain(x_BHWC, 'batch', 'rows', None, None), t_B, y_B)
        walk = Walk(self.grid, self.order)
        return self.finish(walk.back(self._run(x, c, walk), self.depth), c)

    def _run(self, x: Array, c: Array, walk: Walk) -> Array:
        joined = 0 if self.skip == 'none' else self._joined()
        if not joined:
            return run_blocks(self.blocks, x, c, walk, **self.loop)[0]
        x, skips = run_blocks(self.blocks, x, c, walk, last=joined, keep=True, **self.loop)
        x, _ = run_blocks(self.blocks, x, c, walk, first=joined, last=self.depth - joined, **self.loop)
        return run_blocks(self.blocks, x, c, walk, first=self.depth - joined, skips=skips[::-1],
                          joins=self.joins, **self.loop)[0]
