"""Names of tree leaves, and the comparison of stored leaves with those a model expects."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lit_jax.runtime.errors import UserError, listed


def named_leaves(tree) -> dict:
    """{'blocks/attn/proj/kernel': leaf, ...}. Named tuples are indexed by field, sequences by number."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function, tree):
    """`jax.tree.map` of function(name, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_name(path), leaf), tree)


def unflatten(flat: Mapping) -> dict:
    """{'a/b': x} -> {'a': {'b': x}}, the inverse of `named_leaves`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def pick(tree: Mapping, names: Iterable[str]) -> dict:
    """The part of a nested dict with the leaves of these names."""
    flat = named_leaves(tree)
    return unflatten({name: flat[name] for name in names})


def overlaid(tree: Mapping, part: Mapping) -> dict:
    """A nested dict with the leaves that `part` has taken from there."""
    return {name: overlaid(value, part[name]) if isinstance(value, Mapping) and name in part else
            part.get(name, value) for name, value in tree.items()}


def merged(a: Mapping, b: Mapping) -> dict:
    """A nested dict with the leaves of both, which have none in common."""
    return unflatten({**named_leaves(a), **named_leaves(b)})


def placed(abstract, shardings):
    """A tree of jax.ShapeDtypeStruct with the shardings of another tree."""
    def put(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(put, abstract, shardings)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def tree_bytes(tree) -> int:
    """Bytes of all leaves (arrays, abstract arrays, scalars)."""
    return sum(math.prod(np.shape(leaf)) * np.dtype(getattr(leaf, 'dtype', type(leaf))).itemsize
               for leaf in jax.tree.leaves(tree))


def params_sha256(params) -> str:
    """sha256 over names, shapes and little-endian float32 values of all leaves, sorted by name."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        values = np.ascontiguousarray(leaf, '<f4')
        digest.update(f'{name} {list(values.shape)}\n'.encode())
        digest.update(values.data)
    return digest.hexdigest()


def check_leaves(stored: dict, expected: dict, source: str) -> None:
    """Raises a UserError that lists all differences of {name: leaf} as read from `source` and as expected."""
    problems = [f'missing: {name} {_describe(expected[name])}' for name in expected if name not in stored]
    problems += [f'extra: {name} {_describe(stored[name])}' for name in stored if name not in expected]
    problems += [f'different: {name} is {_describe(stored[name])}, expected {_describe(expected[name])}'
                 for name in expected
                 if name in stored and _describe(stored[name]) != _describe(expected[name])]
    if problems:
        raise UserError(f'{source} does not fit the model; {len(problems)} of its arrays differ:'
                        f'{listed(problems, 20)}\nUse the recipe (architecture, optimizer) that they were '
                        'written with, or another source.')


def _describe(leaf) -> str:
    return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
