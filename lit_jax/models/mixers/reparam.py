"""A depth-wise 3 x 3 convolution trained as three and used as one (ACNet, arXiv 1908.03930).

A 3 x 3, a 3 x 1 and a 1 x 3 kernel a channel are added up before the image is touched, since a sum of
convolutions is the convolution with the sum of the kernels: training costs one convolution; `fold` stores it.

ACNet has a BatchNorm behind each branch. Here there is none: in a diffusion model its statistics would mix
images of all noise levels, make an image's output depend on its batch, and be state beside the parameters.
Training still differs from one kernel: the cross in the middle is reached by two parameters."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.convolution import fan_in_uniform
from lit_jax.models.layers import Array
from lit_jax.models.mixers.depthwise import depthwise_conv

SHAPES = {'square': (3, 3), 'column': (3, 1), 'row': (1, 3)}
FORMS = ('branches', 'single', 'none')      # of mixers with such a convolution: option `dwc`


class BranchedConv(nnx.Module):
    """One kernel a channel, all heads' channels side by side: [B, H, W, D] -> [B, H, W, D]."""

    kernel: nnx.Param

    def __init__(self, width: int, *, folded: bool = False, rngs: nnx.Rngs):
        for name, size in ({'kernel': (3, 3)} if folded else SHAPES).items():
            setattr(self, name, nnx.Param(fan_in_uniform(rngs.params(), (*size, 1), (width,))))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.folded = folded

    def __call__(self, x_BHWD: Array) -> Array:
        """Sums in the accumulator, returns the dtype of x."""
        kernel = self.kernel[...] if self.folded else _sum_branches(
            {name: getattr(self, name)[...] for name in SHAPES})
        y_BHW1D = depthwise_conv(x_BHWD[..., None, :], kernel, self.bias[...])
        return y_BHW1D[..., 0, :]


def _sum_branches(branches: Mapping[str, Array]) -> Array:
    """The 3 x 3 kernel of all three, [..., 3, 3, 1, D]: narrow ones lie on its middle column and row."""
    total = branches['square']
    total = total.at[..., :, 1:2, :, :].add(branches['column'])
    return total.at[..., 1:2, :, :, :].add(branches['row'])


def fold(arch: Mapping, params: dict) -> tuple[dict, dict]:
    """(arch, params) of a trained model with one kernel for its branches: the same function.

    Also right for an EMA of the parameters: the sum of averages is the average of sums."""
    def folded(mixer: Mapping, name: str, dwc: str | None) -> dict:
        """`name` and `dwc`: what the mixer has where it says nothing."""
        branches = mixer.get('dwc', dwc) == 'branches' and mixer.get('name', name) == 'dydila'
        return {**mixer, 'dwc': 'single'} if branches else dict(mixer)

    base = arch['mixer']['name']
    stages = [{**stage, 'mixer': folded(own, base, None if own.get('name', base) == base else FORMS[0])}
              if (own := stage.get('mixer')) else dict(stage) for stage in arch.get('stages', ())]
    arch = {**arch, 'mixer': folded(arch['mixer'], base, FORMS[0])}
    if stages:
        arch['stages'] = tuple(stages)
    return arch, _fold_tree(params)


def _fold_tree(tree):
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {*SHAPES, 'bias'}:
        return {'kernel': jax.jit(_sum_branches)({name: tree[name] for name in SHAPES}), 'bias': tree['bias']}
    return {name: _fold_tree(branch) for name, branch in tree.items()}
