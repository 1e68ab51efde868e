"""What differs between two things that should belong together, said the same way everywhere."""
import dataclasses
import math
from collections.abc import Mapping, Sequence

from lit_jax.runtime.errors import UserError

_LINES, _CHARACTERS = 10, 80


def check_alike(a, b, where_a: str, where_b: str, problem: str, advice: str, *, rel_tol: float = 0.0,
                none_fits: bool = False) -> None:
    """Raises UserError '`problem`: every difference (`find_differences`), `advice`' where a and b differ."""
    if lines := find_differences(a, b, where_a, where_b, rel_tol=rel_tol, none_fits=none_fits):
        raise UserError(f'{problem}:\n  {list_lines(lines)}\n{advice}')


def find_differences(a, b, where_a: str, where_b: str, *, rel_tol: float = 0.0,
                     none_fits: bool = False) -> list[str]:
    """Lines such as 'latent.scale: 0.18 in the teacher, 0.13 in the recipe' for values that differ.

    Args:
        a, b: mappings or dataclasses, nested; a field that one lacks is None there. Lists equal tuples.
        where_a, where_b: follow the values: 'in the recipe', 'there', 'now'.
        rel_tol: relative difference up to which two numbers count as equal.
        none_fits: None is not known, and not compared.
    """
    a, b = _flat(a), _flat(b)
    pairs = ((name, a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]))
    return [f'{name}: {_shown(x)} {where_a}, {_shown(y)} {where_b}' for name, x, y in pairs
            if not (_equal(x, y, rel_tol) or none_fits and None in (x, y))]


def list_lines(lines: Sequence[str]) -> str:
    """The first lines, indented below each other, and how many more there are."""
    more = [f'and {len(lines) - _LINES} more'] if len(lines) > _LINES else []
    return '\n  '.join([*lines[:_LINES], *more])


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


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= _CHARACTERS else f'{text[:_CHARACTERS]}...'
