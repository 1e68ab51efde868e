"""Computes attention maps from the queries and keys that mixers expose (`lit_jax.models.probe`).

The map of a head is the matrix A [N, M] of its weights: o = A·v. Softmax attention: A = softmax(q·kᵀ/√E).
Linear attention, which never computes A: A = (q·kᵀ/M) / (q·mean(k) + 1e-6), q and k after φ. Rows sum to 1.
'sum', linear attention without a normaliser: A = q·kᵀ/M; weights may be negative. A mixer has maps if it
calls `dot_product_attention` or `linear_attention`, or exposes the names of KINDS itself.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.analysis.measures import same_time
from lit_jax.models.mixers.linear import EPS
from lit_jax.models.network import Model
from lit_jax.runtime.errors import UserError, shown

Array = jax.Array
KINDS = ('softmax', 'linear', 'sum')
CONVOLUTION = 'linear/convolution'
NAMES = (*(f'{kind}/{what}' for kind in KINDS for what in ('query', 'key')), CONVOLUTION)


class NoMaps(UserError):
    """A model whose attention maps cannot be shown; the rest of it can be analyzed."""


class Layer(NamedTuple):
    """One layer for some images: query [B, N, K, E], key [B, M, K, E], convolution [k, k, 1, E] or None."""
    kind: str
    query: Array
    key: Array
    convolution: Array | None


class Attention:
    """Gives access to the queries and keys of a model.

    Args:
        name: of the model, for messages.
        memory: bytes for the queries and keys of all layers, and again for one layer's maps of one image.
    Raises:
        NoMaps: the mixer has none, or those of the blocks are too different.
        UserError: one image needs more than `memory`.
    """

    def __init__(self, model: Model, name: str, memory: int = 2 ** 30):
        self.model, self.name, self.memory = model, name, memory
        network = model.network
        self._observe = jax.jit(lambda params, x, t, label:
                                network.observe(params, x, t, {'label': label}, NAMES)[1])
        shape, int_1 = (1, *network.arch['input_size'], network.arch['channels']), jnp.zeros(1, jnp.int32)
        one = jax.eval_shape(self._observe, network.abstract(), jnp.zeros(shape, jnp.float32), int_1, int_1)
        kinds = [kind for kind in KINDS if one[f'{kind}/query']]
        if not kinds:
            raise NoMaps(f'{name} has the mixer {shown(network.arch["mixer"]["name"])}, which has no '
                         f'attention maps. Analyze its loss instead: --parts=loss')
        if len(kinds) > 1 or len(one[CONVOLUTION]) not in (0, len(one[f'{kinds[0]}/query'])):
            raise NoMaps(f'the blocks of {name} have mixers too different to be compared in one figure. '
                         f'Analyze its loss instead: --parts=loss')
        self.kind = kinds[0]
        self.shapes = [tuple(leaf.shape[1:]) for leaf in one[f'{self.kind}/key']
                       for _ in range(leaf.shape[0])]
        self.image_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        if self.image_bytes > memory:
            raise UserError(f'the queries and keys of one image in {name} take '
                            f'{self.image_bytes / 2 ** 30:.2f} GiB, more than the {memory / 2 ** 30:.2f} GiB '
                            f'of --memory; give more, or analyze only the loss: --parts=loss')

    @property
    def depth(self) -> int:
        return len(self.shapes)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the query tokens."""
        arch = self.model.arch
        return tuple(side // arch['patch'] for side in arch['input_size'])

    @property
    def batch(self) -> int:
        """Images whose queries and keys fit into memory together."""
        return max(1, self.memory // self.image_bytes)

    def row_step(self) -> int:
        """The step between queries with which one layer's maps of one image, in float32, fit into memory."""
        queries = self.grid[0] * self.grid[1]
        largest = max(4 * queries * keys * heads for _, keys, heads, _ in self.shapes)
        return -(-largest // self.memory)

    def layers(self, x_BHWC, t: float, label_B) -> list[Layer]:
        """All layers, for at most `batch` images at time t."""
        seen = self._observe(self.model.params, jnp.asarray(x_BHWC), same_time(t, len(label_B)),
                             jnp.asarray(label_B))
        queries, keys = seen[f'{self.kind}/query'], seen[f'{self.kind}/key']
        convolutions = seen[CONVOLUTION] or [None] * len(queries)
        return [Layer(self.kind, q[i], k[i], None if c is None else c[i])
                for q, k, c in zip(queries, keys, convolutions, strict=True) for i in range(len(q))]


@functools.partial(jax.jit, static_argnames='kind')
def attention_map(kind: str, query_NKE: Array, key_MKE: Array) -> Array:
    """The maps [K, N, M] of one image, float32 or wider. Any queries may be left out, no keys."""
    dtype = jnp.promote_types(query_NKE.dtype, jnp.float32)
    q, k = query_NKE.astype(dtype), key_MKE.astype(dtype)
    products = jnp.einsum('nke,mke->knm', q, k, precision='highest')
    if kind == 'softmax':
        return jax.nn.softmax(products / np.sqrt(q.shape[-1]).astype(dtype))
    means = products / k.shape[0]
    return means if kind == 'sum' else means / (means.sum(-1, keepdims=True) + EPS)
