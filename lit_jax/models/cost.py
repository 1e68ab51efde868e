"""What a network costs: its parameters, its multiply-accumulates, and the state that its tokens exchange.

The papers' "Gflops" are multiply-accumulates (DiT-XL/2 at 256px: 118.6), so that is what is counted here.
`network_macs` counts every product of the traced program (lit_jax/models/macs.py). A `Convention` says what a
paper leaves out of that, and `paper_macs` leaves it out too, so that a printed figure can be compared with
the same thing.
"""
import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from lit_jax.models.arch import mixing_layers
from lit_jax.models.macs import PRODUCTS, count_macs, macs_by_parameter
from lit_jax.models.network import Network, count_parameters

__all__ = ['Convention', 'count_macs', 'counted_by', 'format_parameters', 'macs_of', 'network_macs',
           'paper_macs', 'state_bytes']


def network_macs(network: Network) -> int:
    """Multiply-accumulates of one forward pass for one image, everything counted."""
    return macs_of(network).total()


def macs_of(network: Network) -> Counter:
    """The same by parameter: {path: MACs}, with the products of activations under ''."""
    return macs_by_parameter(network.apply, network.abstract(), *network.example_inputs())


# ------------------------------------------------------------------------------------------------------
# As a paper counts


@dataclass(frozen=True)
class Convention:
    """What a paper counts as the cost of its model.

    Attributes:
        products: of activations with each other: 'all', as the program takes them; 'none'; or 'cheaper':
            (Q·Kᵀ)·V or Q·(Kᵀ·V) in every layer, whichever is less, and nothing for a normaliser.
        left_out: patterns (fnmatch) of the paths of parameters whose products are not counted.
        why: in words.
    """
    products: str = 'all'
    left_out: tuple[str, ...] = ()
    why: str = 'everything'


def paper_macs(network: Network, convention: Convention) -> int:
    """Multiply-accumulates of one forward pass for one image, as `convention` counts them.

    Raises ValueError for a pattern that fits no parameter: a renamed one would be counted without a word.
    """
    return counted_by(macs_of(network), network.arch, convention)


def counted_by(counts: Counter, arch: Mapping, convention: Convention) -> int:
    """`paper_macs` from the accounts of `macs_of`, which are left as they are."""
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
        queries, keys = math.prod(grid), _keys(mixer, grid)
        channels, size = _channels(mixer, width)
        total += layers * _sets(mixer) * channels * min(2 * queries * keys, (queries + keys) * size)
    return total


# ------------------------------------------------------------------------------------------------------
# State: what the tokens exchange


def state_bytes(arch: Mapping) -> int:
    """Bytes that stand between the tokens of one image in a forward pass, over all layers.

    That is what must be kept to mix in one more token: for softmax attention the keys and values of all the
    others, two bytes a number (bfloat16); for linear attention one E x E sum and the E numbers of its
    normaliser a head, whatever the number of tokens, four bytes a number (sums are kept in float32).
    """
    return sum(layers * STATES[mixer['name']](mixer, width, grid)
               for layers, mixer, width, grid in mixing_layers(arch))


def _keys(mixer: Mapping, grid: tuple[int, int]) -> int:
    """Keys (and values) for the queries of all tokens of the grid."""
    if mixer['name'] == 'edit':
        return math.prod(-(-side // 2) for side in grid)
    return math.prod(grid) // mixer.get('compress', 1) ** 2


def _channels(mixer: Mapping, width: int) -> tuple[int, int]:
    """(channels of all heads together, channels of one)."""
    size = mixer.get('head_dim') or width // mixer['heads']
    return mixer['heads'] * size, size


def _sets(mixer: Mapping) -> int:
    """How many pairs of queries and keys attend."""
    return 2 if mixer.get('difference') == 'maps' else 1


def _keys_and_values(mixer, width, grid) -> int:
    return 2 * 2 * _keys(mixer, grid) * _channels(mixer, width)[0]


def _sums(mixer, width, grid) -> int:
    channels, size = _channels(mixer, width)
    return 4 * channels * (size + 1)


def _dydila_sums(mixer, width, grid) -> int:
    channels, size = _channels(mixer, width)
    return 4 * channels * (_sets(mixer) * size + (mixer.get('normaliser') == 'weights'))


def _gla_state(mixer, width, grid) -> int:
    ways = {'causal': 1, 'bidirectional': 2, 'four': 4}[mixer.get('directions', 'causal')]
    channels, size = _channels(mixer, width)
    return 4 * ways * channels * int(size * mixer.get('expand_k', 0.5))


STATES = {'softmax': _keys_and_values, 'moh': _keys_and_values, 'linear': _sums, 'sana': _sums, 'edit': _sums,
          'dydila': _dydila_sums, 'gla': _gla_state}


# ------------------------------------------------------------------------------------------------------
# The table of parameters


def format_parameters(network: Network) -> str:
    """The parameter table: path, shape, dtype, count, MB; then totals, GMACs of one forward pass, and its
    state."""
    rows = [f'{"parameter":34} {"shape":26} {"dtype":8} {"count":>13} {"MB":>9}']
    for path, leaf in jax.tree_util.tree_leaves_with_path(network.abstract()):
        count = int(np.prod(leaf.shape))
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        rows.append(f'{name:34} {str(leaf.shape):26} {leaf.dtype!s:8} {count:13,} '
                    f'{count * leaf.dtype.itemsize / 1e6:9.2f}')
    leaves = jax.tree.leaves(network.abstract())
    trained = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    megabytes = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / 1e6
    rows.append(f'{"total":70} {trained:13,} {megabytes:9.2f}')
    table = 'with the fixed position table, ' if network.conditioning == 'label' else ''
    rows.append(f'{table}as the papers count: {count_parameters(network):,} parameters')
    known = all(mixer['name'] in STATES for _, mixer, _, _ in mixing_layers(network.arch))
    state = f', {state_bytes(network.arch) / 2 ** 20:.4g} MiB of state between its tokens' if known else ''
    rows.append(f'one forward pass of one image: {network_macs(network) / 1e9:.4g} GMACs{state}')
    return '\n'.join(rows)
