"""JSON and text from files that anybody may have written: limits, one wording of errors, checked shapes."""
import json
import os
import sys
import zlib
from collections.abc import Mapping

from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.paths import as_path, explain_unreadable

SEAL = 'checksum'
_LEVELS, _DIGITS = 64, 400
_REQUIRED = object()
_WORDS = {str: 'a text', bool: 'true or false', int: 'an integer', float: 'a finite number', None: 'null'}


def read_json(path, shape=object, *, absent=_REQUIRED):
    """The content of a JSON file in UTF-8; `absent`, if given, where there is no file and no link.

    Raises UserError, with the file's name, for one that cannot be read, is no JSON, is nested more than 64
    levels deep, has numbers of more than 400 digits, or has not the `shape` (`check_shape`)."""
    path = as_path(path)
    if absent is not _REQUIRED and not path.exists() and not os.path.islink(path):
        return absent
    with explain_unreadable(path):
        data = path.read_bytes()
    return parse_json(data, path, shape)


def parse_json(data: bytes | str, where, shape=object):
    """`read_json` of bytes or text that lie in memory; `where` names their file in messages."""
    text = _decoded(data, where) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, parse_int=_parse_int, parse_float=_parse_float)
    except RecursionError:
        raise UserError(f'{where} is damaged: nested more than {_LEVELS} levels deep') from None
    except ValueError as error:
        raise UserError(f'{where} is damaged, it is not JSON: {error}. Get or make it again, or restore it '
                        'from a copy') from None
    _check_levels(value, where, surrogates='\\ud' in text.lower())
    check_shape(value, shape, where)
    return value


def plain(value):
    """A value as it comes back from a JSON file: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def sealed(content: Mapping) -> dict:
    """The content of a JSON file with a checksum of itself, its last field."""
    content = {name: value for name, value in content.items() if name != SEAL}
    return content | {SEAL: _checksum(content)}


def unsealed(content, where):
    """The content without its checksum. UserError where it is not the one that it was written with; files of
    earlier versions have none."""
    if not isinstance(content, dict) or SEAL not in content:
        return content
    rest = {name: value for name, value in content.items() if name != SEAL}
    if content[SEAL] != _checksum(rest):
        raise UserError(f'{where} is damaged: its content does not match its own checksum (if you changed it '
                        f'yourself, delete its field "{SEAL}")')
    return rest


def _checksum(content: Mapping) -> str:
    return f'{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}'


def read_lines(path) -> list[str]:
    """The lines of a text file in UTF-8, without their ends (LF or CRLF).

    `str.splitlines` would also split at U+2028, U+0085 and other characters that stand within a line."""
    path = as_path(path)
    with explain_unreadable(path):
        data = path.read_bytes()
    return split_lines(_decoded(data, path))


def split_lines(text: str) -> list[str]:
    """Lines of a text without their ends (LF or CRLF), the empty rest after the last end left out."""
    lines = [line.removesuffix('\r') for line in text.split('\n')]
    return lines if lines[-1] else lines[:-1]


def check_shape(value, shape, where) -> None:
    """Raises UserError, which names `where` and the place in it, if a value from a file has not the shape.

    Shapes: `str`, `bool`, `int`, `float` (any finite number), `None`, `object` (anything), `[S]` (a list of
    S), `{str: S}` (a mapping of any names to S), `{'name': S, 'other?': S}` (these entries, the second may
    be missing or null, further ones are allowed), and a tuple of shapes, one of which must hold."""
    if problem := _find_problem(value, shape, ''):
        place, given, expected = problem
        raise UserError(f'{where} is damaged: {place or "its content"} is {shown(given)}, '
                        f'expected {expected}')


def _find_problem(value, shape, place: str):
    if isinstance(shape, tuple):
        problems = [_find_problem(value, option, place) for option in shape]
        nested = [problem for problem in problems if problem and problem[0] != place]
        return None if None in problems else (nested or [(place, value, _described(shape))])[0]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return place, value, _described(shape)
        return _first(_find_problem(item, shape[0], f'{place}[{i}]') for i, item in enumerate(value))
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return place, value, _described(shape)
        return _first(_find_problem(*entry) for entry in _entries(value, shape, place))
    return None if _fits(value, shape) else (place, value, _described(shape))


def _entries(value: dict, shape: Mapping, place: str):
    for name, inner in shape.items():
        if name is str:
            yield from ((item, inner, _joined(place, key)) for key, item in value.items())
        else:
            bare = name.removesuffix('?')
            if bare == name or value.get(bare) is not None:
                yield value.get(bare), inner, _joined(place, bare)


def _joined(place: str, key: str) -> str:
    return f'{place}.{shown_name(key)}' if place else shown_name(key)


def _fits(value, shape) -> bool:
    if shape is object:
        return True
    if shape is None:
        return value is None
    if shape is float:
        return _is_number(value) and abs(value) <= sys.float_info.max     # not so: NaN, infinity, 10**400
    return _is_number(value) and isinstance(value, int) if shape is int else isinstance(value, shape)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _described(shape) -> str:
    if isinstance(shape, tuple):
        return ' or '.join(map(_described, shape))
    if isinstance(shape, list):
        return 'a list'
    if isinstance(shape, Mapping):
        return 'an object'
    return _WORDS[shape]


def _first(problems):
    return next((problem for problem in problems if problem), None)


def _decoded(data: bytes, where) -> str:
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{where} is not text in UTF-8 (byte {error.start}); save it as UTF-8') from None


def _parse_int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f'a number of {len(text)} digits')
    return int(text)


def _parse_float(text: str) -> float:
    if len(text) > _DIGITS:
        raise ValueError(f'a number of {len(text)} digits')
    return float(text)


def _check_levels(value, where, surrogates: bool) -> None:
    level = [value]
    for _ in range(_LEVELS):
        if surrogates and any(isinstance(item, str) and _is_broken(item) for item in level):
            raise UserError(f'{where} is damaged: it holds half of a character (an unpaired surrogate)')
        level = [item for outer in level for item in _inner(outer)]
        if not level:
            return
    raise UserError(f'{where} is damaged: nested more than {_LEVELS} levels deep')


def _inner(value):
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def _is_broken(text: str) -> bool:
    return any('\ud800' <= character <= '\udfff' for character in text)
