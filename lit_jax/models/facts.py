"""Facts that a mixer or ffn states about itself: how its parameters are sharded (`lit_jax.training.mesh`),
seen as matrices (`training.matrices`) and named in PyTorch files (`lit_jax.convert`)."""
from collections.abc import Mapping
from dataclasses import dataclass, field

NO_NULL_CLASS = ('this model was trained without dropping classes, so it has no null class that guidance '
                 'could lead away from: draw with --cfg_scale 1')


def has_null_class(arch: Mapping) -> bool:
    """Whether the null class of an architecture was trained; models of captions always have an empty one."""
    return arch.get('null_class', True)


@dataclass(frozen=True)
class Leaf:
    """A parameter: its axes, and its place in a PyTorch file.

    Attributes:
        path: in the parameter tree, below the mixer or ffn: 'qkv/kernel'. Leaves that are alike and have no
            PyTorch name may share one regular expression: 'routed_[qk]/kernel'.
        shape: axes of one layer: letters, integers or None. D (width) of a matrix is sharded over `fsdp`, K
            (heads) and F (inner width) over `tensor`; others are not. The converter reads sizes by letter
            too: E channels of a head, Q of its keys and V of its values where they differ, k side of a
            depth-wise kernel, p patch, C channels, O outputs of a token, R rows of the label table, X heads
            of the cross-attention, Y channels and L tokens of a caption.
        transform: a key of `lit_jax.convert.torch_keys.TRANSFORMS`: how a tensor becomes this leaf, and which
            axes are the inputs of a matrix: of 'linear' the first, of 'linear_in' and 'conv' all but the
            last, of 'depthwise' the first two; 'copy' and 'flat' are vectors.
        original: PyTorch key ({i}: the block) below that of the mixer or ffn. '': no published model has it,
            and it is exported unchanged under its own path.
        diffusers: keys joined along their first axis; empty: diffusers has no such model.
        banks: leading axes that count matrices."""
    path: str
    shape: tuple
    transform: str
    original: str = ''
    diffusers: tuple[str, ...] = ()
    banks: int = 0

    def keys(self, layout: str) -> tuple[str, ...]:
        """The PyTorch keys in `layout` ('original' or 'diffusers'), in the order of joining."""
        return (self.original,) if layout == 'original' else self.diffusers


def product(path: str, shape: tuple, transform: str = 'linear', original: str = '',
            diffusers: tuple[str, ...] = ()) -> tuple[Leaf, Leaf]:
    """The leaves of a product or convolution: its `kernel` of this shape and its `bias`."""
    outputs = {'linear': shape[1:], 'pointwise': shape[1:], 'depthwise': shape[2:]}.get(transform, shape[-1:])
    names = [(original and f'{original}.{end}', tuple(f'{key}.{end}' for key in diffusers))
             for end in ('weight', 'bias')]
    return (Leaf(f'{path}/kernel', shape, transform, *names[0]),
            Leaf(f'{path}/bias', tuple(side for side in outputs if side != 1), 'flat', *names[1]))


@dataclass
class Blocks:
    """The blocks found in a PyTorch file: fields of the architecture, and problems."""
    mixer: dict
    stages: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    family: dict = field(default_factory=lambda: {'family': 'dit'})     # its name and fields of its own


def head_problems(heads: int | None, width: int) -> list[str]:
    """Why a file cannot be read with this number of heads: messages for the person who converts it."""
    if heads is None:
        return [f'the number of heads cannot be seen in the file, and width {width} with this depth is none '
                f'of DiT\'s sizes; give --heads N']
    if heads < 1 or width % heads:
        return [f'{heads} heads do not divide the width {width}; give --heads N with an N that does']
    return []
