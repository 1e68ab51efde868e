"""Top-1 routing: each token takes one of several matrices, or one of several numbers, by its largest logit.

The choice has no derivative. Two readings of a paper that writes only `argmax`:

- `straight_through`: forward the hard choice, backward that of a softmax over the logits. A number picked
  from a bank gets all of it. The product with a picked matrix gets the part of that matrix: its output is
  scaled by a gate of value one whose derivative is that of the picked probability. The parts of the others
  would need their products too, the cost that routing avoids.
- `frozen`: taken literally. Routers keep their random initialisation; the rest is trained."""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Init, xavier_uniform
from lit_jax.models.mixers.grouped import grouped_product
from lit_jax.models.partition import constrain, partition_spec
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

GRADIENTS = ('straight_through', 'frozen')


class Route(NamedTuple):
    """The choices of a batch of tokens.

    index_BN: the choice, int32. weights_BNP: one for it and zero for the others, in the accumulator; their
    derivative is the softmax's, or none."""
    index_BN: Array
    weights_BNP: Array

    def pick(self, bank_P: Array) -> Array:
        """Each token's number from a bank of P, [B, N]."""
        return (self.weights_BNP * bank_P.astype(self.weights_BNP.dtype)).sum(-1)

    def gate(self) -> Array:
        """One for every token, with the derivative of the probability of its choice: [B, N]."""
        chosen = self.index_BN[..., None] == jnp.arange(self.weights_BNP.shape[-1])
        return jnp.where(chosen, self.weights_BNP, 0).sum(-1)

    def usage(self) -> Array:
        """The share of the tokens with each choice, [P]."""
        return jax.lax.stop_gradient(self.weights_BNP).mean((0, 1))


class Router(nnx.Module):
    """Tokens, or several parts of them, to a `Route`; kernel [parts·D, choices], without bias.

    Logits are summed in the accumulator: bfloat16 would round many to equal ones, and the first would win."""

    def __init__(self, width: int, choices: int, *, parts: int = 1, gradient: str = 'straight_through', dtype,
                 rngs: nnx.Rngs):
        if gradient not in GRADIENTS:
            raise UserError(f'unknown router {shown(gradient)}; known: {", ".join(GRADIENTS)}')
        self.gradient, self.dtype = gradient, dtype
        self.kernel = nnx.Param(xavier_uniform(rngs.params(), (parts * width,), (choices,)))

    def __call__(self, *x_BND: Array) -> Route:
        """x: each of the parts [B, N, ...] with D numbers a token."""
        kernels = jnp.split(self.kernel[...].astype(self.dtype), len(x_BND))
        logits: Any = sum(self._product(x, kernel) for x, kernel in zip(x_BND, kernels, strict=True))
        index = logits.argmax(-1).astype(jnp.int32)
        weights = jax.nn.one_hot(index, logits.shape[-1], dtype=logits.dtype)
        if self.gradient == 'straight_through':
            soft = jax.nn.softmax(logits)
            weights = weights + (soft - jax.lax.stop_gradient(soft))
        return Route(index, weights)

    def _product(self, x: Array, kernel: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1).astype(self.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=accumulator(self.dtype))


def entropy(usage_P: Array) -> Array:
    """Entropy of the shares of P choices over that of equal shares: 1 for equal use, 0 if one takes all."""
    return -jnp.where(usage_P > 0, usage_P * jnp.log(usage_P), 0).sum() / math.log(max(usage_P.size, 2))


class RoutedLinear(nnx.Module):
    """x·W_u with one of `choices` matrices picked for each token: [B, N, D] -> [B, N, K, E]. Without bias.
    Costs one product, whatever the number of matrices."""

    def __init__(self, width: int, head: tuple[int, int], choices: int, *, gradient: str = 'straight_through',
                 init: Init = xavier_uniform, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.router = Router(width, choices, gradient=gradient, dtype=dtype, rngs=rngs)
        keys = jax.random.split(rngs.params(), choices)
        self.kernel = nnx.Param(jax.vmap(lambda key: init(key, (width,), head))(keys))

    def __call__(self, x_BND: Array) -> tuple[Array, Route]:
        """The products in the compute dtype, and the choices."""
        route = self.router(x_BND)
        y_BNKE = routed_product(x_BND.astype(self.dtype), self.kernel[...].astype(self.dtype), route.index_BN)
        y_BNKE = constrain(y_BNKE, 'batch', 'tokens', 'heads', None)
        return y_BNKE * route.gate()[..., None, None].astype(self.dtype), route


def routed_product(x_BND: Array, kernel_PDKE: Array, index_BN: Array) -> Array:
    """x·kernel[index] for every token, [B, N, K, E]. On a mesh each device sorts its own tokens."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return _flat_product(x_BND, kernel_PDKE, index_BN)
    tokens = partition_spec(x_BND.shape, 'batch', 'tokens', None)
    kernel = partition_spec(kernel_PDKE.shape, None, None, 'heads', None)
    shape = (*x_BND.shape[:2], *kernel_PDKE.shape[2:])
    return jax.shard_map(_flat_product, in_specs=(tokens, kernel, jax.sharding.PartitionSpec(*tokens[:2])),
                         out_specs=partition_spec(shape, 'batch', 'tokens', 'heads', None), check_vma=False)(
        x_BND, kernel_PDKE, index_BN)


def _flat_product(x_BND, kernel_PDKE, index_BN):
    (b, n, d), (choices, _, *head) = x_BND.shape, kernel_PDKE.shape
    y = grouped_product(x_BND.reshape(b * n, d), kernel_PDKE.reshape(choices, d, math.prod(head)),
                        index_BN.reshape(-1))
    return y.reshape(b, n, *head)
