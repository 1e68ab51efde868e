"""The range of a number: which values a field may have, and the words for it in a message."""
import math
import numbers
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lit_jax.runtime.errors import UserError, listed, shown

MOST = 2 ** 31 - 1       # steps and sizes are int32 in compiled programs


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    whole: integers only. above, below: without `low`, without `high`. also: values beside them (a number, a
    word, None) that stand for a choice of their own."""
    low: float
    high: float = MOST
    whole: bool = True
    above: bool = False
    below: bool = False
    also: tuple = ()

    def holds(self, value) -> bool:
        if any(value is one or (type(value) is type(one) and value == one) for one in self.also):
            return True
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not self.whole and not _finite(value):
            return False
        number: Any = value
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        what = 'a whole number' if self.whole else 'a number'
        low = f'above {_short(self.low)}' if self.above else f'from {_short(self.low)} on'
        if self.high != MOST:
            low = low if self.above else f'at least {_short(self.low)}'
            low += f' and {"below" if self.below else "at most"} {_short(self.high)}'
        return ' or '.join([f'{what} {low}', *map(repr, self.also)])


FINITE = Range(-1e30, 1e30, whole=False)      # of a number that no table knows


def share(**more) -> Range:
    """A part of the whole, from 0 to 1."""
    return Range(0, 1, whole=False, **more)


def weight(high: float = 1e6, **more) -> Range:
    """A factor that is not negative."""
    return Range(0, high, whole=False, **more)


def check_ranges(values: Mapping, ranges: Mapping[str, Range], section: str = '') -> None:
    """Raises UserError with every field of nested mappings that is outside its range in `ranges`, which knows
    it by its full name, 'train.steps'; the items of a list are 'eval.cfg_scales[]'. Numbers without a range
    must be finite; anything else is free. section: put before all names."""
    wrong = [f'{name} must be {ranges.get(name, FINITE)}, got {shown(value)}'
             for name, value in flattened(values, section, ranges)
             if (name in ranges or _is_number(value)) and not ranges.get(name, FINITE).holds(value)]
    if wrong:
        raise UserError(wrong[0] if len(wrong) == 1 else f'{len(wrong)} fields are out of range:'
                        + listed(wrong))


def flattened(values: Mapping, section: str = '',
              whole: Collection[str] = ()) -> Iterator[tuple[str, object]]:
    """(full name, value) of everything in nested mappings and lists; values named in `whole` stay whole."""
    for name, value in values.items():
        yield from _flattened(f'{section}.{name}' if section else str(name), value, whole)


def _flattened(name: str, value, whole: Collection[str]) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and name not in whole:
        yield from flattened(value, name, whole)
    elif isinstance(value, tuple | list) and name not in whole:
        for item in value:
            yield from _flattened(f'{name}[]', item, whole)
    else:
        yield name, value


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _finite(value) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:      # an integer beyond float64
        return False


def _short(value: float) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:g}'
