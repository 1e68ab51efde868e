"""The base class of token mixers, `Mixer`, and what they state about themselves."""
import inspect
import math
from collections.abc import Mapping
from typing import ClassVar

from flax import nnx

from lit_jax.models.facts import Blocks, Leaf, head_problems


class Mixer(nnx.Module):
    """The part of a block in which tokens see each other.

    A subclass has `__init__(self, width, *, ..., dtype, rngs)`, whose further keywords are the options of
    `model.mixer` in a recipe, and `__call__(x_BND, grid) -> x_BND` with grid = (H, W), rows first, N = H·W.
    It contains its own projections and sums over tokens in `accumulator(dtype)`. An option `heads` must
    divide the width, and `tensor` shards it.

    Everything below is optional; `mixer` is the dict of a recipe or architecture: name and options.

    Attributes:
        leaves: the parameters (`lit_jax.models.facts.Leaf`). Without them weights cannot be sharded.
        parts: where q, k, v and o of the attention lie, for a student to inherit: {'k': ('kv', 0)}:
            (projection, index on the axis of its parts or None).
        losses, statistics, routes: names that it shows (`lit_jax.models.probe`): scalar losses, scalars for
            the log, indices [B, N] of the choices of routers.
        usual_heads: of a student whose recipe does not say (`suggest`); None: as many as its teacher has.
        published_ffn: a ffn that tells its PyTorch files from those of other mixers with the same tensors."""
    leaves: ClassVar[tuple[Leaf, ...]] = ()
    parts: ClassVar[Mapping[str, tuple[str, int | None]]] = {}
    losses: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    routes: ClassVar[tuple[str, ...]] = ()
    usual_heads: ClassVar[int | None] = None
    published_ffn: ClassVar[str | None] = None

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The options of `model.mixer` beside the name."""
        own = inspect.signature(cls.__init__).parameters
        return {name: own[name] for name in own if name not in ('self', 'width', 'dtype', 'rngs')}

    @classmethod
    def defaults(cls) -> dict:
        """The options that have a default."""
        return {name: option.default for name, option in cls.options().items()
                if option.default is not inspect.Parameter.empty}

    @classmethod
    def suggest(cls, teacher: Mapping) -> dict:
        """Values for options that a student's recipe leaves open. teacher: its architecture."""
        return {'heads': cls.usual_heads or teacher['mixer'].get('heads')}

    @staticmethod
    def row_unit(mixer: Mapping) -> int | None:
        """Rows of tokens that must stay on one device of the mesh axis `seq`; None: all of them."""
        return 1

    @staticmethod
    def keys(mixer: Mapping, grid: tuple[int, int]) -> int:
        """Keys (and values) for the queries of all tokens of the grid."""
        return math.prod(grid)

    @staticmethod
    def sets(mixer: Mapping) -> int:
        """Number of pairs of queries and keys that attend."""
        return 1

    @staticmethod
    def state_bytes(mixer: Mapping, width: int, grid: tuple[int, int]) -> int | None:
        """Bytes of state of one image (`lit_jax.models.cost.state_bytes`); None: not defined."""
        return None

    @classmethod
    def read_torch(cls, found, hints, published) -> Blocks:
        """The blocks of a PyTorch file that holds tensors of this mixer's `leaves`.

        Args:
            found: `lit_jax.convert.torch_survey.Found`: sizes by letter, depth, `holds(leaf)`, `side(leaf,
                layer, axis)`, `hub`. hints: `torch_survey.Hints` from the caller.
            published: models (`config.model`) with published weights, for facts that tensors do not show."""
        return Blocks({'heads': hints.heads}, problems=head_problems(hints.heads, found.sizes['D']))


def head_channels(mixer: Mapping, width: int) -> tuple[int, int]:
    """(channels of all heads together, channels of one)."""
    heads = mixer.get('heads', 1)
    size = mixer.get('head_dim') or width // heads
    return heads * size, size
