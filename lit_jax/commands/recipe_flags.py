"""Reads `--config=RECIPE`, the overrides of its fields, and a command's own flags."""
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from lit_jax.recipes.find import find_recipe
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import Options, parse_beside
from lit_jax.runtime.shipped import shipped_folder


def parse_recipe(kind: type[Options], description: str | None = None) -> tuple[ConfigDict, Options]:
    """The recipe of --config with its overrides, and the command's own flags, from sys.argv.

    UserError for a missing recipe, and for fields that are unknown or of the wrong type."""
    help_wanted = {'-h', '--help'} & set(sys.argv)
    options, rest = parse_beside('config', kind, description=description,
                                 epilog=_describe_recipes() if help_wanted else None)
    argv = [sys.argv[0], *_with_files(rest)]
    config = config_flags.DEFINE_config_file('config', None, 'A recipe: its name, or a file.',
                                             lock_config=True, sys_argv=argv)
    try:
        stray = flags.FLAGS(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = error         # config_flags wraps the message in further exceptions
        while isinstance(reason, Exception) and len(reason.args) == 1:
            reason = reason.args[0]
        # Its text includes the traceback of a recipe, whose own error is at the end.
        _, marker, said = str(error).rpartition(f'{UserError.__module__}.{UserError.__name__}: ')
        if marker:
            raise UserError(said.strip()) from error
        raise UserError(f'the command line cannot be read: {"; ".join(str(reason).splitlines())}') from error
    if config.value is None:
        raise UserError('no recipe given; try --config=digits_dit')
    if stray:
        raise UserError(f'unknown arguments: {" ".join(stray)}; fields of the recipe are set with '
                        '--config.NAME=VALUE')
    return config.value, options


def _with_files(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with the recipe's file instead of its name; config_flags reports a missing one late."""
    names = False
    for argument in arguments:
        flag, equals, name = argument.partition('=')
        if names:
            yield find_recipe(argument)
        elif flag in ('--config', '-config') and equals:
            yield f'{flag}={find_recipe(name)}'
        else:
            yield argument
        names = argument in ('--config', '-config')


def _describe_recipes() -> str:
    """The help of --config, with all recipes."""
    lines = ['recipe:',
             '  --config=NAME[:ROW]    a recipe of the list below or a file; ROW: one of several in a file',
             '  --config.FIELD=VALUE   overrides a field, for example --config.train.batch_size=64;',
             '                         --config=NAME --dry_run prints all fields', '',
             'recipes:']
    configs = shipped_folder('configs')
    for path in sorted(configs.rglob('*.py')):
        title = ' '.join(path.read_text(encoding='utf-8').split('"""')[1].split('\n\n')[0].split())
        name = path.relative_to(configs).with_suffix('').as_posix()
        lines.append(f'  {name:22} {textwrap.shorten(title, 84, placeholder=" ...")}')
    return '\n'.join(lines)
