"""Command lines made from frozen dataclasses: name, type, default and help of an option in one place.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class DrawOptions(Processes):
        source: str = option('model folder or workdir', flag='--from')        # no default: required
        steps: int = option('model evaluations', default=50)                  # help adds (default: 50)
        classes: tuple[int, ...] = option('class indices', default=(), group='which images')  # 1,2,3

    options = parse_options(DrawOptions, description=__doc__)

Unlike with tyro, flags keep their names (`--image_size` or `--image-size`), comma lists and help groups, and
the import costs nothing; absl's help has neither groups nor choices."""
import argparse
import dataclasses
import difflib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lit_jax.runtime.errors import UserError, as_typed, printable, shown_name
from lit_jax.runtime.hub import refuse_output

Options = TypeVar('Options')
# What other programs, and other commands of this one, call a flag.
_NAMESAKES = {'workdir': ('out',), 'out': ('workdir',), 'output': ('out', 'workdir'), 'model': ('from',),
              'ckpt': ('from',), 'checkpoint': ('from',), 'guidance_scale': ('cfg_scale',)}


def option(help: str, *, default: Any = dataclasses.MISSING, flag: str = '', choices: Collection = (),
           metavar: str | tuple[str, ...] = '', nargs: int | str | None = None, repeat: bool = False,
           parse: Callable[[str], Any] | None = None, group: str = '') -> Any:
    """A field of a dataclass of options.

    Args:
        help: text; the default is added to it. Where None stands for a computed default, the text names it.
        flag: default `--` and the field's name. Without dashes: a positional argument of that name.
        choices: allowed values (not texts).
        nargs: for tuples: number of separate words, or '+'. None: one word, `1,2,3`.
        repeat: for tuples: the flag may be repeated, once per value.
        parse: text -> value, instead of the annotation's type; raises ValueError.
        group: heading in the help."""
    return dataclasses.field(default=default, metadata={
        'help': help, 'flag': flag, 'choices': tuple(choices), 'metavar': metavar, 'nargs': nargs,
        'repeat': repeat, 'parse': parse, 'group': group})


def _heartbeat(text: str) -> int:
    if int(text) < 5:
        raise argparse.ArgumentTypeError(f'at least 5 seconds, got {text}')
    return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Options of every command that can run as several processes, for `cli.join`."""
    coordinator: str | None = option('HOST:PORT of process 0, where no scheduler sets it', default=None,
                                     metavar='HOST:PORT', group='several processes')
    num_processes: int | None = option('number of processes in this run, with --coordinator', default=None,
                                       group='several processes')
    process_id: int | None = option('index of this process, from 0, with --coordinator', default=None,
                                    group='several processes')
    heartbeat_seconds: int = option('a process that is silent for so long counts as lost', default=60,
                                    metavar='N', parse=_heartbeat, group='several processes')


def parse_options(kind: type[Options], argv: Sequence[str] | None = None, *, prog: str | None = None,
                  description: str | None = None) -> Options:
    """An instance of `kind` from a command line. Errors, and a UserError of its `__post_init__`, exit with 2.

    argv: default sys.argv[1:]. prog: name in the help, default sys.argv[0]. description: printed verbatim."""
    return parse_beside('', kind, argv, prog=prog, description=description)[0]


def parse_beside(other: str, kind: type[Options], argv: Sequence[str] | None = None, *,
                 prog: str | None = None, description: str | None = None,
                 epilog: str | None = None) -> tuple[Options, list[str]]:
    """(options, remaining words): `parse_options` beside another parser of `--other` and `--other.NAME`."""
    description, epilog = (text and as_typed(text) for text in (description, epilog))
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)   # the dataclass has the defaults
    hints, needed = typing.get_type_hints(kind), [f'--{other}=FILE'] if other else []
    groups: dict[str, Any] = {'': parser}
    for field in _flags(kind):
        group = field.metadata['group']
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        action = _add(groups[group], field, hints[field.name])
        if action.required:
            needed.append(' '.join([*action.option_strings, str(action.metavar)]))
    parser.usage = ' '.join(['%(prog)s', *needed, '[options]'])    # not every flag again, above every error
    known = {'--help', *map(_flag, _flags(kind))}
    words = _underscored(parser, known, other, sys.argv[1:] if argv is None else argv)
    if not other and words and not words[0].startswith('-') and all(flag.startswith('-') for flag in known):
        parser.error(f'unknown arguments: {shown_name(words[0])}{_meant(words[0], known)}')
    values, rest = parser.parse_known_args(words)
    if rest and not other:
        parser.error(f'unknown arguments: {" ".join(map(shown_name, rest))}{_meant(rest[0], known)}')
    try:
        for name in ('out', 'workdir'):
            refuse_output(getattr(values, name, ''))
        return kind(**{name: tuple(value) if isinstance(value, list) else value
                       for name, value in vars(values).items()}), rest
    except UserError as error:
        parser.error(as_typed(printable(str(error))))


def _meant(word: str, known: Collection[str]) -> str:
    """What a word without a flag may have been meant for."""
    if word.partition('=')[0] in {flag.lstrip('-') for flag in known}:
        return f'; did you mean --{word}?'
    for flag in ('--samples', '--from', '--path', '--out') if '/' in word or os.path.exists(word) else ():
        if flag in known and (flag != '--samples' or word.endswith('.npz')):
            return f'; did you mean {flag}={word}?'
    return ''


def given(options: Any, *groups: str) -> list[str]:
    """Flags of the options that differ from their defaults; with `groups`, only of these."""
    return [_flag(field) for field in _flags(type(options))
            if field.default not in (dataclasses.MISSING, getattr(options, field.name))
            and (not groups or field.metadata['group'] in groups)]


def _flag(field: dataclasses.Field) -> str:
    return field.metadata['flag'] or f'--{field.name}'


def _flags(kind: type) -> list[dataclasses.Field]:
    """Fields made by `option`, in the order of the help: a command's own before those that several share."""
    def depth(field):
        return next(i for i, base in enumerate(kind.__mro__) if field.name in inspect.get_annotations(base))
    return sorted((field for field in dataclasses.fields(kind) if 'flag' in field.metadata), key=depth)


def _add(group: Any, field: dataclasses.Field, hint: Any) -> argparse.Action:
    told, flag, needed = field.metadata, _flag(field), field.default is dataclasses.MISSING
    text = told['help']
    if not needed and field.default is not False and field.default not in (None, '', ()):
        shown, between = field.default, ',' if told['nargs'] is None else ' '
        text += f' (default: {between.join(map(str, shown)) if isinstance(shown, tuple) else shown})'
    keywords = {'help': text.replace('%', '%%')}          # argparse reads % as the start of a format
    if flag.startswith('-'):
        keywords |= {'dest': field.name, 'required': needed}
    elif not needed:
        keywords |= {'nargs': '?', 'default': field.default}     # argparse would give SUPPRESS to `type`
    name = flag if flag.startswith('-') else field.name
    if hint is bool:
        return group.add_argument(name, action='store_true', **keywords)
    several = told['nargs'] is not None or told['repeat']
    read: Any
    word: str | None
    if told['choices']:
        read, word = _choose(told['choices']), '{' + ','.join(map(str, told['choices'])) + '}'
        keywords['choices'] = told['choices']
    else:
        read, word = (told['parse'], None) if told['parse'] else _reader(hint, several)
        if read in (str, Path) and not several and field.default != '':
            read = _given(read)
    keywords |= {'nargs': told['nargs']} if told['nargs'] is not None else {}
    keywords |= {'action': 'append'} if told['repeat'] else {}
    return group.add_argument(name, type=read, metavar=told['metavar'] or word or flag.strip('-').upper(),
                              **keywords)


def _choose(choices: tuple) -> Callable[[str], Any]:
    """Text -> the choice written so; other texts stay as they are, and argparse lists the choices."""
    return lambda text: {str(choice): choice for choice in choices}.get(text, text)


def _reader(hint: Any, several: bool) -> tuple[Callable[[str], Any], str | None]:
    """(text -> value, placeholder in the help) of an annotation; `several`: for one value of a tuple."""
    words, kinds = {int: 'N', float: 'X', str: None, Path: None}, typing.get_args(hint)
    if isinstance(hint, types.UnionType) and len(kinds) == 2 and kinds[1] is types.NoneType:
        return _reader(kinds[0], several)
    if typing.get_origin(hint) is tuple:
        return _reader(kinds[0], False) if several else _list_reader(kinds)
    if hint not in words:
        raise TypeError(f'an option of type {hint} needs choices or parse')
    return hint, words[hint]


def _given(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Refuses an empty text."""
    def read(text: str):
        if not text:
            raise argparse.ArgumentTypeError('it is empty (a variable of the shell that is not set?)')
        return kind(text)
    return read


def _list_reader(kinds: tuple) -> tuple[Callable[[str], tuple], str]:
    """Reads tuple[X, ...] as any number of values with commas between, tuple[X, X] as exactly two."""
    kind, count = kinds[0], 0 if kinds[-1] is Ellipsis else len(kinds)

    def read(text: str) -> tuple:
        try:
            values = tuple(kind(part.strip()) for part in text.split(',') if part.strip())
            if count not in (0, len(values)):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a list of {f"{count} " if count else ""}'
                                             f'{kind.__name__} with commas between') from None
        return values
    word = {int: 'N', float: 'X', str: 'NAME'}[kind]
    return read, ','.join([word] * count if count else [word, word, '...'])


def _underscored(parser: argparse.ArgumentParser, known: set[str], other: str,
                 argv: Sequence[str]) -> list[str]:
    """The command line with `_` for `-` in flags. An unknown flag is an error that names the nearest known
    one; argparse would first complain about missing flags."""
    words, others = list(argv), {f'--{other}', f'--no{other}'} if other else set()
    end = words.index('--') if '--' in words else len(words)
    for index, word in enumerate(words[:end]):
        asked, equals, value = word.partition('=')
        if not asked.startswith('--') or asked.split('.')[0] in others:
            continue
        name = '--' + asked[2:].replace('-', '_')
        if name not in known:
            near = difflib.get_close_matches(name[2:], [flag[2:] for flag in known | others], n=1)
            near = near or [flag for flag in _NAMESAKES.get(name[2:], ()) if f'--{flag}' in known][:1]
            if other and '.' in name:
                near = [f'{other}.{asked[2:]}{equals}{value}']
            hint = f'; did you mean --{near[0]}?' if near else ''
            parser.error(f'unknown flag {shown_name(asked)}{hint}')
        words[index] = name + equals + value
    return words
