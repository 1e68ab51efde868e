"""Differences between two settings that should agree, in one wording for all messages."""
import dataclasses
import math
from collections.abc import Mapping

from lit_jax.runtime.errors import UserError, listed, shown

LINES = 10


def check_alike(a, b, where_a: str, where_b: str, problem: str, advice: str, *, rel_tol: float = 0.0,
                none_fits: bool = False) -> None:
    """Raises UserError with `problem`, the differences and `advice` where a and b differ."""
    if lines := find_differences(a, b, where_a, where_b, rel_tol=rel_tol, none_fits=none_fits):
        raise UserError(f'{problem}:{listed(lines, LINES)}\n{advice}')


def find_differences(a, b, where_a: str, where_b: str, *, rel_tol: float = 0.0,
                     none_fits: bool = False) -> list[str]:
    """Lines such as 'latent.scale: 0.18 in the teacher, 0.13 in the recipe' for values that differ.

    Args:
        a, b: mappings or dataclasses, nested; a missing field counts as None. Lists equal tuples.
        where_a, where_b: written after the values: 'in the recipe', 'there', 'now'.
        rel_tol: relative difference up to which two numbers count as equal.
        none_fits: do not compare with None."""
    a, b = _flat(a), _flat(b)
    pairs = ((name, a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]))
    return [f'{name}: {shown(x)} {where_a}, {shown(y)} {where_b}' for name, x, y in pairs
            if not (_equal(x, y, rel_tol) or none_fits and None in (x, y))]


def _flat(thing, name: str = '') -> dict:
    """{'train.steps': 3, ...}"""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        thing = dataclasses.asdict(thing)
    if not isinstance(thing, Mapping):
        return {name: _plain(thing)}
    flat: dict = {}
    for key, value in thing.items():
        flat |= _flat(value, f'{name}.{key}' if name else str(key))
    return flat


def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _equal(x, y, rel_tol: float) -> bool:
    numbers = all(isinstance(value, int | float) for value in (x, y))
    return math.isclose(x, y, rel_tol=rel_tol) if numbers and rel_tol else x == y
