"""FID-Inception: the network of Google's 2015-12-05 graph, the features of FID, sFID, IS, KID and precision.

It is Inception v3 (arXiv 1512.00567) with 1008 classes; unlike torchvision's, average pools leave padding out
of the mean, the last block's pool branch has a max pool, and images have values 0 to 255 and are resized as
in TensorFlow 1. Names of blocks and units are those of the published PyTorch file.

    network = InceptionNetwork()
    features = network.features(params, images)      # uint8 [B, H, W, 3] -> pool, spatial, logits

A unit is convolution, batch norm and ReLU. Batch norm in inference is a scale and a shift of each channel,
which are folded into the unit's kernel and bias (`fold_batch_norm`)."""
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.models.functional import Functional
from lit_jax.models.layers import Array
from lit_jax.models.resize import resize_tf1
from lit_jax.runtime.compiler import without_ynnpack
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

EPSILON = 1e-3            # of every batch norm
SIZE = 299                # pixels of a side inside the network
CLASSES = 1008
WIDTH = 2048              # of the pooled features
SPATIAL_CHANNELS = 7      # of Mixed_6d's first branch, used by sFID
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
PRECISIONS = ('highest', 'bfloat16')
_NHWC = ('NHWC', 'HWIO', 'NHWC')
_RIM = ((0, 0), (1, 1), (1, 1), (0, 0))      # one pixel around images

# Units before the blocks: name, channels out, kernel side, stride, padding; max pools stand between.
_STEM = (('Conv2d_1a_3x3', 32, 3, 2, 'VALID'), ('Conv2d_2a_3x3', 32, 3, 1, 'VALID'),
         ('Conv2d_2b_3x3', 64, 3, 1, 'SAME'), None, ('Conv2d_3b_1x1', 80, 1, 1, 'SAME'),
         ('Conv2d_4a_3x3', 192, 3, 1, 'VALID'), None)


def _block_a(pooled: int) -> dict:
    return {'branch1x1': [(64, 1, 1)], 'branch5x5': [(48, 1, 1), (64, 5, 5)],
            'branch3x3dbl': [(64, 1, 1), (96, 3, 3), (96, 3, 3)], 'branch_pool': [(pooled, 1, 1)]}


def _block_c(c: int) -> dict:
    return {'branch1x1': [(192, 1, 1)], 'branch7x7': [(c, 1, 1), (c, 1, 7), (192, 7, 1)],
            'branch7x7dbl': [(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)],
            'branch_pool': [(192, 1, 1)]}


_BLOCK_E = {'branch1x1': [(320, 1, 1)], 'branch3x3': [(384, 1, 1), [(384, 1, 3), (384, 3, 1)]],
            'branch3x3dbl': [(448, 1, 1), (384, 3, 3), [(384, 1, 3), (384, 3, 1)]],
            'branch_pool': [(192, 1, 1)]}

# Block -> branches, in the order of their channels. A branch is a chain of units (channels out, kernel height
# and width); a list of two is two units side by side. Blocks without `branch_pool` halve the sides: the last
# unit of each branch has stride 2, and the third branch is a max pool alone.
_BLOCKS = {
    'Mixed_5b': _block_a(32), 'Mixed_5c': _block_a(64), 'Mixed_5d': _block_a(64),
    'Mixed_6a': {'branch3x3': [(384, 3, 3)], 'branch3x3dbl': [(64, 1, 1), (96, 3, 3), (96, 3, 3)]},
    'Mixed_6b': _block_c(128), 'Mixed_6c': _block_c(160), 'Mixed_6d': _block_c(160),
    'Mixed_6e': _block_c(192),
    'Mixed_7a': {'branch3x3': [(192, 1, 1), (320, 3, 3)],
                 'branch7x7x3': [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)]},
    'Mixed_7b': _BLOCK_E, 'Mixed_7c': _BLOCK_E,
}


class Unit(nnx.Module):
    """A convolution with its batch norm folded in, and a ReLU: [B, H, W, I] -> [B, H', W', O], x's dtype."""

    def __init__(self, width_in: int, width_out: int, size: tuple[int, int], *, stride: int = 1,
                 padding: str = 'SAME', rngs: nnx.Rngs):
        self.stride, self.padding = stride, padding
        kernel = jax.random.normal(rngs.params(), (*size, width_in, width_out), jnp.float32)
        self.kernel = nnx.Param(kernel * (2 / np.prod((*size, width_in))) ** 0.5)      # He-normal
        self.bias = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width_out,), jnp.float32))

    def __call__(self, x_BHWI: Array) -> Array:
        return self.activate(convolve(x_BHWI, self.kernel[...], self.stride, self.padding))

    def activate(self, y_BHWO: Array) -> Array:
        return jax.nn.relu(y_BHWO + self.bias[...].astype(y_BHWO.dtype))


class Block(nnx.Module):
    """Branches side by side (see `_BLOCKS`), their channels joined. pool: 'average' or 'max', of the pool
    branch. count_padding: whether average pools count the zeros around an image (FID's do not)."""

    branch_pool: Unit

    def __init__(self, width_in: int, branches: Mapping, *, pool: str, count_padding: bool, rngs: nnx.Rngs):
        self.pool, self.count_padding = pool, count_padding
        self.halves = 'branch_pool' not in branches
        chains, self.width_out = [], width_in if self.halves else 0
        for branch, units in branches.items():
            width, chain = width_in, []
            for step, sides in enumerate(units, 1):
                sides = [sides] if isinstance(sides, tuple) else sides
                stride, padding = (2, 'VALID') if self.halves and step == len(units) else (1, 'SAME')
                name = f'{branch}_{step}' if len(units) > 1 else branch
                names = (name,) if len(sides) == 1 else (f'{name}a', f'{name}b')
                for name, (out, *size) in zip(names, sides, strict=True):
                    setattr(self, name, Unit(width, out, tuple(size), stride=stride, padding=padding,
                                             rngs=rngs))
                chain.append(names)
                width = sum(out for out, *_ in sides)
            chains.append(tuple(chain))
            self.width_out += width
        self.chains = tuple(chains)

    def __call__(self, x_BHWD: Array) -> Array:
        starts = self._start_together(x_BHWD)
        outputs = []
        for chain in self.chains:
            y = x_BHWD
            for names in chain:
                y = starts[names[0]] if names[0] in starts else _join(
                    [getattr(self, name)(y) for name in names])
            outputs.append(y)
        if self.halves:
            outputs.append(max_pool(x_BHWD, 2))
        return _join(outputs)

    def _start_together(self, x_BHWD: Array) -> dict[str, Array]:
        """Outputs of the 1 x 1 units on the block's input, computed as one product. An average of products is
        the product of the average, so the pool branch takes part and pools fewer channels."""
        names = [chain[0][0] for chain in self.chains
                 if getattr(self, chain[0][0]).kernel.shape[:2] == (1, 1)]
        pooled_before = 'branch_pool' in names and self.pool == 'max'
        together = [name for name in names if not (pooled_before and name == 'branch_pool')]
        kernels = [getattr(self, name).kernel[...] for name in together]
        products = convolve(x_BHWD, jnp.concatenate(kernels, -1), 1, 'SAME')
        ends = np.cumsum([kernel.shape[-1] for kernel in kernels])
        starts = {}
        for name, y in zip(together, jnp.split(products, ends[:-1], axis=-1), strict=True):
            y = average_pool(y, self.count_padding) if name == 'branch_pool' else y
            starts[name] = getattr(self, name).activate(y)
        if pooled_before:
            starts['branch_pool'] = self.branch_pool(max_pool(x_BHWD, 1))
        return starts


class Inception(nnx.Module):
    """The whole network on images [B, 299, 299, 3], scaled to -1 .. 1."""

    def __init__(self, *, last_pool: str, count_padding: bool, rngs: nnx.Rngs):
        width = 3
        for entry in filter(None, _STEM):
            name, out, side, stride, padding = entry
            setattr(self, name, Unit(width, out, (side, side), stride=stride, padding=padding, rngs=rngs))
            width = out
        for name, branches in _BLOCKS.items():
            pool = last_pool if name == 'Mixed_7c' else 'average'
            block = Block(width, branches, pool=pool, count_padding=count_padding, rngs=rngs)
            setattr(self, name, block)
            width = block.width_out
        self.fc = Head(width, CLASSES, rngs=rngs)

    def __call__(self, x_BHW3: Array) -> dict[str, Array]:
        """Activations after each block, and 'pool' [B, 2048]: the mean of the last over its pixels."""
        x, taps = x_BHW3, {}
        for entry in _STEM:
            x = getattr(self, entry[0])(x) if entry else max_pool(x, 2)
        for name in _BLOCKS:
            x = taps[name] = getattr(self, name)(x)
        return {**taps, 'pool': x.astype(accumulator(x.dtype)).mean((1, 2))}


class Head(nnx.Module):
    """The linear layer of the classes; its bias is stored, though the inception score leaves it out."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(width_in ** -0.5
                                * jax.random.normal(rngs.params(), (width_in, width_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width_out,), jnp.float32))

    def __call__(self, pool_BD: Array) -> Array:
        """Logits without the bias."""
        return jnp.matmul(pool_BD, self.kernel[...].astype(pool_BD.dtype),
                          precision=jax.lax.Precision.HIGHEST)


class InceptionNetwork(Functional):
    """FID-Inception as functions over a plain dict of parameters: `init`, `abstract`, `features`.

    Args:
        precision: of convolutions. 'highest': float32 on every kind of device; 'bfloat16': rounded operands
            and activations, faster on accelerators, and scores about 1 % off the published ones.
        last_pool: 'max' as in the graph; other implementations take 'average'.
        count_padding: whether average pools count the zeros of the padding; in the graph they do not.
        resize: function (image_BHWC, 299) -> float32 [B, 299, 299, 3]."""

    def __init__(self, precision: str = 'highest', *, last_pool: str = 'max', count_padding: bool = False,
                 resize: Callable = resize_tf1):
        if precision not in PRECISIONS:
            raise UserError(f'unknown precision {shown(precision)} of Inception; known: '
                            f'{", ".join(PRECISIONS)}')
        if last_pool not in ('max', 'average'):
            raise UserError(f'last_pool must be max or average, got {shown(last_pool)}')
        self.precision, self._resize = precision, resize
        super().__init__(lambda rngs: Inception(last_pool=last_pool, count_padding=count_padding, rngs=rngs))

    def inference_options(self) -> dict:
        """`compiler_options` of jax.jit. On CPU without YNNPACK, whose convolutions take twice as long."""
        return without_ynnpack()

    def activations(self, params: dict, images_BHWC: Array) -> dict[str, Array]:
        """Outputs of all blocks by name, and 'pool'. Images as for `features`."""
        dtype = jnp.bfloat16 if self.precision == 'bfloat16' else params['fc']['kernel'].dtype
        x = (self._resize(images_BHWC, SIZE) - 128) / 128
        return self._merge(params)(x.astype(dtype))

    def features(self, params: dict, images_BHWC: Array) -> dict[str, Array]:
        """Images [B, H, W, 3], 0 .. 255 -> float32 'pool' [B, 2048], 'spatial' [B, 2023], 'logits' [B, 1008].

        spatial: the first seven channels of Mixed_6d's first branch, rows slowest, channels fastest. logits:
        without the bias. Parameters in float64 give everything in float64."""
        if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
            raise UserError(f'Inception takes images [B, H, W, 3], got {list(images_BHWC.shape)}')
        found = self.activations(params, images_BHWC)
        spatial = found['Mixed_6d'][..., :SPATIAL_CHANNELS].astype(found['pool'].dtype)
        return {'pool': found['pool'], 'spatial': spatial.reshape(len(spatial), -1),
                'logits': self._merge(params).fc(found['pool'])}


def fold_batch_norm(kernel: np.ndarray, gain: np.ndarray, shift: np.ndarray, mean: np.ndarray,
                    variance: np.ndarray, epsilon: float = EPSILON) -> tuple[np.ndarray, np.ndarray]:
    """(kernel HWIO, bias) in float32 of a convolution without bias followed by batch norm in inference;
    computed in float64 and rounded once."""
    scale = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    bias = shift.astype(np.float64) - mean.astype(np.float64) * scale
    return (kernel.astype(np.float64) * scale).astype(np.float32), bias.astype(np.float32)


def convolve(x_BHWI: Array, kernel: Array, stride: int, padding: str) -> Array:
    """A convolution without bias in x's dtype; float32 operands are never rounded."""
    kernel = kernel.astype(x_BHWI.dtype)
    return jax.lax.conv_general_dilated(x_BHWI, kernel, (stride, stride), padding, dimension_numbers=_NHWC,
                                        precision=jax.lax.Precision.HIGHEST)


def max_pool(x_BHWD: Array, stride: int) -> Array:
    """Over 3 x 3 pixels; stride 1 keeps the size, stride 2 takes whole windows only."""
    if stride == 1:
        x_BHWD = jnp.pad(x_BHWD, _RIM, constant_values=-jnp.inf)
    return _over_windows(jnp.maximum, x_BHWD, stride)


def average_pool(x_BHWD: Array, count_padding: bool) -> Array:
    """Means over the 3 x 3 pixels around each, in the accumulator; see `Block` for `count_padding`."""
    acc = accumulator(x_BHWD.dtype)
    total = _over_windows(jnp.add, jnp.pad(x_BHWD.astype(acc), _RIM), 1)
    rows, columns = (np.full(side, 3.0) if count_padding else np.convolve(np.ones(side), np.ones(3), 'same')
                     for side in x_BHWD.shape[1:3])
    return (total / np.outer(rows, columns)[:, :, None].astype(acc)).astype(x_BHWD.dtype)


def _over_windows(combine: Callable[[Array, Array], Array], x_BHWD: Array, stride: int) -> Array:
    """3 x 3 windows, axis by axis, as slices: XLA:CPU's own windows take three to five times as long."""
    for axis in (2, 1):
        last = (x_BHWD.shape[axis] - 3) // stride * stride
        parts = [jax.lax.slice_in_dim(x_BHWD, i, i + last + 1, stride, axis) for i in range(3)]
        x_BHWD = combine(combine(parts[0], parts[1]), parts[2])
    return x_BHWD


def _join(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
