"""Sets fields of a recipe from texts, as `--config.train.steps=1e5` does on the command line."""
import ast
import difflib
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from lit_jax.recipes.hybrids import check_stages_text
from lit_jax.runtime.errors import UserError, shown

_SWITCH = {'true': True, '1': True, 'yes': True, 'on': True, 'false': False, '0': False, 'no': False,
           'off': False}
_WORDS = re.compile(r'[a-z]+:\d+(,[a-z]+:\d+)*')      # short forms, as of model.stages


def override(config: ConfigDict, field: str, text: str | bool) -> None:
    """Sets `field` ('train.steps') to what `text` says in the type of its present value; True and False are
    switches, without a text.

    UserError for an unknown field, with those near it, for a section, and for a text of another type."""
    section, _, name = field.rpartition('.')
    inside = _find(config, section) if section else config
    if not isinstance(inside, ConfigDict) or name not in inside:
        raise UserError(f'the recipe has no field {shown(field)}{_near(config, field)}')
    old = inside[name]
    kind = inside.get_type(name) if old is None else type(old)      # an open field has a type, and no value
    if isinstance(text, bool):
        if kind is not bool:
            raise UserError(f'--config.{field} needs a value: the recipe has {shown(old)}')
        inside[name] = text
        return
    if name == 'stages':
        check_stages_text(text)
    inside[name] = (_section(old, field, text) if isinstance(old, ConfigDict) else
                    _parse(kind, old, field, text))


def _find(config: ConfigDict, path: str):
    for name in path.split('.'):
        if not isinstance(config, ConfigDict) or name not in config:
            return None
        config = config[name]
    return config


def fields(config: ConfigDict, before: str = '') -> Iterator[str]:
    """Names of all fields, with the sections before them: 'train.steps'."""
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict) and len(value):
            yield from fields(value, f'{before}{name}.')
        else:
            yield before + name


def _near(config: ConfigDict, field: str) -> str:
    known = sorted(fields(config), key=lambda name: not name.startswith('train.'))
    last = field.rpartition('.')[2]
    near = [name for name in known if name.rpartition('.')[2] == last][:3]
    near = near or difflib.get_close_matches(field, known, n=1, cutoff=0.7)
    if not near:      # the right name in no section, or nearly so
        alike = difflib.get_close_matches(last, {name.rpartition('.')[2] for name in known}, n=1, cutoff=0.7)
        near = [name for name in known if name.rpartition('.')[2] in alike][:3]
    if near:
        return f'; did you mean {" or ".join(f"--config.{name}" for name in near)}?'
    section = field.partition('.')[0]
    if section in config and isinstance(config[section], ConfigDict):
        return f'; {section} has {", ".join(config[section])}'
    return f'; its sections: {", ".join(name for name in config if isinstance(config[name], ConfigDict))}'


def _section(old: ConfigDict, field: str, text: str) -> ConfigDict:
    try:
        value = ast.literal_eval(text)
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        first = 'name' if 'name' in old else next(iter(old), 'NAME')
        said = text if first == 'name' and text.isidentifier() else 'VALUE'
        raise UserError(f'--config.{field}={text}: {field} is a section, with the fields '
                        f'{", ".join(old)}; set one of them, as in --config.{field}.{first}={said}') from None
    return ConfigDict(value).lock()


def _parse(kind: type, old, field: str, text: str):
    try:
        if kind is bool:
            return _SWITCH[text.strip().lower()]
        if kind is int:
            return _integer(text)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        if kind is tuple and _WORDS.fullmatch(text):
            return tuple(text.split(','))
        value = ast.literal_eval(text)
        if kind is tuple and not isinstance(value, tuple | list):
            value = (value,)
        return tuple(value) if kind is tuple else value
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        wanted = {bool: 'True or False', int: 'a whole number, such as 1000 or 1e5',
                  float: 'a number, such as 0.1 or 1e-4', tuple: 'a list, such as 1,2'}
        raise UserError(f'--config.{field}={shown(text)}: expected {wanted.get(kind, "a value of Python")}; '
                        f'the recipe has {shown(old)}') from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer() or abs(value) > 2**53:
            raise ValueError from None
        return int(value)
