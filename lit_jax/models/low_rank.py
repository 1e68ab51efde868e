"""Low-rank updates of frozen kernels (LoRA, Hu et al. 2021, arXiv 2106.09685): kernel + a·b.

They stand beside their kernel: `lora_a` [layers, inputs, rank], random, and `lora_b` [layers, rank, outputs],
zero at first, so the model begins unchanged to the bit. Networks know nothing of them: parameters are merged
before they are applied."""
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from lit_jax.runtime.leaves import merged, named_leaves, unflatten

A, B = 'lora_a', 'lora_b'


def is_update(name: str) -> bool:
    """Whether a leaf is a factor of an update."""
    return name.rpartition('/')[2] in (A, B)


def factor_names(kernels: Iterable[str]) -> tuple[str, ...]:
    """Names of the factors of these kernels."""
    return tuple(f'{name.removesuffix("kernel")}{factor}' for name in kernels for factor in (A, B))


def with_updates(params: dict, kernels: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict:
    """`params` and new factors for these kernels: {name: (axes that count matrices, axes of inputs)}.
    a is uniform with standard deviation 1/sqrt(3 · inputs), as PyTorch's linear layers and peft have it."""
    leaves, factors, key = named_leaves(params), {}, jax.random.key(seed)
    for number, (name, (layers, rows)) in enumerate(sorted(kernels.items())):
        shape = leaves[name].shape
        lead, inputs = shape[:layers], math.prod(shape[layers:layers + rows])
        bound = inputs ** -0.5
        a, b = factor_names([name])
        factors[a] = jax.random.uniform(jax.random.fold_in(key, number), (*lead, inputs, rank), jnp.float32,
                                        -bound, bound)
        factors[b] = jnp.zeros((*lead, rank, math.prod(shape[layers + rows:])), jnp.float32)
    return merged(params, unflatten(factors))


def merge_updates(params: Mapping, merge: Callable | None = None) -> dict:
    """The parameters of a network: updates are added to their kernels, and their factors left out."""
    return {name: merge_updates(value, merge) if isinstance(value, Mapping) else
            (merge or _merge)(value, params[A], params[B]) if name == 'kernel' and A in params else value
            for name, value in params.items() if name not in (A, B)}


def merge_stored(params: dict) -> dict:
    """The same outside of a program; each kernel keeps its sharding."""
    return merge_updates(params, lambda kernel, a, b: jax.jit(_merge, out_shardings=kernel.sharding)(
        kernel, a, b))


def _merge(kernel, a, b):
    return kernel + jnp.matmul(a, b, precision='highest').reshape(kernel.shape)
