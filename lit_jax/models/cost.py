"""The cost of a network: parameters, multiply-accumulates, and the state that its tokens share.

The papers' "Gflops" are multiply-accumulates (DiT-XL/2 at 256px: 118.6), so that is the unit here.
`network_macs` counts every product of the traced program (lit_jax/models/macs.py); `paper_macs` leaves out
what a paper's `Convention` leaves out, for comparison with its printed figures."""
import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from lit_jax.models.arch import mixing_layers
from lit_jax.models.macs import PRODUCTS, macs_by_parameter
from lit_jax.models.mixers import find_mixer
from lit_jax.models.mixers.mixer import head_channels
from lit_jax.models.network import Network, count_fixed, count_parameters


def network_macs(network: Network) -> int:
    """Multiply-accumulates of one forward pass for one image, everything counted."""
    return macs_of(network).total()


def macs_of(network: Network) -> Counter:
    """The same by parameter: {path: MACs}; products of activations have the key ''."""
    return macs_by_parameter(network.apply, network.abstract(), *network.example_inputs())


@dataclass(frozen=True)
class Convention:
    """The products that a paper counts as the cost of its model.

    Attributes:
        products: of activations with each other: 'all', as in the program; 'none'; or 'cheaper': the cheaper
            of (Q·Kᵀ)·V and Q·(Kᵀ·V) in every layer, and nothing for a normaliser.
        left_out: patterns (fnmatch) of parameter paths whose products are not counted. why: in words."""
    products: str = 'all'
    left_out: tuple[str, ...] = ()
    why: str = 'everything'


def paper_macs(network: Network, convention: Convention) -> int:
    """Multiply-accumulates of one forward pass for one image, as `convention` counts them. ValueError for a
    pattern that matches no parameter: a renamed parameter would be counted silently."""
    return counted_by(macs_of(network), network.arch, convention)


def counted_by(counts: Counter, arch: Mapping, convention: Convention) -> int:
    """`paper_macs` from the result of `macs_of`, which is not modified."""
    counts = counts.copy()
    for pattern in convention.left_out:
        if not (names := [name for name in counts if name and fnmatch.fnmatch(name, pattern)]):
            raise ValueError(f'no product of this network has a parameter like {pattern!r}')
        for name in names:
            del counts[name]
    taken = counts.pop(PRODUCTS, 0)
    products = {'all': lambda: taken, 'none': lambda: 0, 'cheaper': lambda: _cheaper_products(arch)}
    return counts.total() + products[convention.products]()


def _cheaper_products(arch: Mapping) -> int:
    total = 0
    for layers, mixer, width, grid in mixing_layers(arch):
        kind = find_mixer(mixer['name'])
        queries, keys = math.prod(grid), kind.keys(mixer, grid)
        channels, size = head_channels(mixer, width)
        total += layers * kind.sets(mixer) * channels * min(2 * queries * keys, (queries + keys) * size)
    return total


def state_bytes(arch: Mapping) -> int | None:
    """Bytes needed to mix in one more token of an image, over all layers; None where a mixer does not define
    it. Softmax attention keeps the keys and values of all tokens (bfloat16); linear attention one E x E sum
    and E numbers of the normaliser a head (float32), whatever the number of tokens."""
    total = 0
    for layers, mixer, width, grid in mixing_layers(arch):
        if (state := find_mixer(mixer['name']).state_bytes(mixer, width, grid)) is None:
            return None
        total += layers * state
    return total


def format_parameters(network: Network) -> str:
    """The parameter table: path, shape, dtype, count, MB; then totals, GMACs of a forward pass, state."""
    rows = [f'{"parameter":34} {"shape":26} {"dtype":8} {"count":>13} {"MB":>9}']
    for path, leaf in jax.tree_util.tree_leaves_with_path(network.abstract()):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        rows.append(f'{name:34} {str(leaf.shape):26} {leaf.dtype!s:8} {leaf.size:13,} '
                    f'{leaf.size * leaf.dtype.itemsize / 1e6:9.2f}')
    leaves = jax.tree.leaves(network.abstract())
    megabytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e6
    if fixed := count_fixed(network.arch):
        rows.append(f'{"position table, fixed: counted, not stored":70} {fixed:13,} {0:9.2f}')
    rows.append(f'{"total, as the papers count":70} {count_parameters(network):13,} {megabytes:9.2f}')
    state = state_bytes(network.arch)
    text = '' if state is None else f', {state / 2 ** 20:.4g} MiB of state between its tokens'
    rows.append(f'one forward pass of one image: {network_macs(network) / 1e9:.4g} GMACs{text}')
    return '\n'.join(rows)
