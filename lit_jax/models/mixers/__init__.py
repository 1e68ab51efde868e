"""Token mixers: the part of a block in which tokens see each other, and the table of them.

A mixer is an `nnx.Module` with `__init__(self, width, *, heads, ..., dtype, rngs)` and `__call__(x_BND, grid)
-> x_BND`; grid = (H, W), rows first, N = H·W. It owns its projections and takes its sums over tokens in
`accumulator(dtype)`. To add one: a file here, an entry in MIXERS. Where they apply, a class says also:

    losses, statistics    names of scalars that it shows (`lit_jax.models.probe`): losses of its own, figures
                          for the log
    row_unit(mixer)       static; rows of tokens that must stay on one device of the mesh axis `seq`; None:
                          all of them. Without it 1: any row may lie anywhere
"""
import inspect
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lit_jax.models.mixers.dydila import DyDiLA
from lit_jax.models.mixers.edit import EditAttention
from lit_jax.models.mixers.gla import GatedLinearAttention
from lit_jax.models.mixers.linear import LinearAttention
from lit_jax.models.mixers.moh import MohAttention
from lit_jax.models.mixers.sana import SanaAttention
from lit_jax.models.mixers.softmax import SoftmaxAttention
from lit_jax.runtime.errors import UserError

MIXERS: dict[str, Any] = {
    'softmax': SoftmaxAttention, 'linear': LinearAttention, 'edit': EditAttention, 'moh': MohAttention,
    'dydila': DyDiLA, 'sana': SanaAttention, 'gla': GatedLinearAttention}


def build_mixer(mixer: Mapping, width: int, *, dtype, rngs: nnx.Rngs) -> nnx.Module:
    """The mixer that a recipe describes: {'name': a key of MIXERS, 'heads': ..., further options of its
    class}.

    Raises UserError for an unknown name, unknown or missing options, and values the mixer cannot take.
    """
    options = dict(mixer)
    name = options.pop('name', None)
    if name not in MIXERS:
        raise UserError(f'unknown mixer {name!r}; known: {", ".join(MIXERS)}')
    arguments = inspect.signature(MIXERS[name].__init__).parameters
    known = [k for k in arguments if k not in ('self', 'width', 'dtype', 'rngs')]
    if unknown := [k for k in options if k not in known]:
        raise UserError(f'mixer {name!r} has no option {", ".join(map(repr, unknown))}; its options: '
                        f'{", ".join(known)}')
    if missing := [k for k in known if k not in options and arguments[k].default is inspect.Parameter.empty]:
        raise UserError(f'mixer {name!r} needs {", ".join(missing)}; add it to model.mixer')
    heads = options['heads']
    if isinstance(heads, bool) or not isinstance(heads,
                                                 int) or heads < 1 or (width % heads
                                                                       and not options.get('head_dim')):
        divisors = ', '.join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise UserError(f'{heads!r} heads do not divide the width {width}; possible: {divisors}')
    return MIXERS[name](width, **options, dtype=dtype, rngs=rngs)
