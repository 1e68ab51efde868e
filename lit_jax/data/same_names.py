"""Finds names that look the same: macOS writes an accented letter as two characters (NFD), lists mostly as
one (NFC)."""
import unicodedata
from collections.abc import Collection, Iterable


def match_names(wanted: Iterable[str], there: Collection[str]) -> dict[str, str]:
    """{name in `wanted`: name in `there`} for those that have one: the same, or else the only one that looks
    the same and that nobody else wants."""
    wanted, there = dict.fromkeys(wanted), dict.fromkeys(there)
    found = {name: name for name in wanted if name in there}
    if len(found) == len(wanted):
        return found
    lacking = _by_form(name for name in wanted if name not in found)
    free = _by_form(name for name in there if name not in wanted)
    return found | {names[0]: free[form][0] for form, names in lacking.items()
                    if len(names) == 1 and len(free.get(form, ())) == 1}


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(unicodedata.normalize('NFC', name), []).append(name)
    return forms
