"""Reads `--config=RECIPE`, the overrides of its fields, and a command's own flags."""
import re
import sys
import textwrap
from collections.abc import Sequence

from ml_collections import ConfigDict

from lit_jax.commands.mixer_flags import set_mixer, split_mixer
from lit_jax.recipes.find import find_recipe
from lit_jax.recipes.override import override
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.options import Options, parse_beside
from lit_jax.runtime.shipped import shipped_folder

# The section that only recipes of a command have.
COMMANDS = {'model': 'train.py', 'vae': 'train_vae.py'}


def parse_recipe(kind: type[Options], description: str | None = None, *,
                 section: str = 'model') -> tuple[ConfigDict, Options]:
    """The recipe of --config with its overrides, and the command's own flags, from sys.argv.

    section: which the command's recipes have. UserError for a missing recipe, one of another command, and
    for fields that are unknown or of the wrong type."""
    help_wanted = {'-h', '--help'} & set(sys.argv)
    options, rest = parse_beside('config', kind, description=description,
                                 epilog=_describe_recipes() if help_wanted else None)
    name, changes = split_arguments(rest)
    find_recipe(name)      # a typing mistake is answered before jax is imported
    from lit_jax.recipes.recipe import load_recipe
    config = load_recipe(name)
    if section not in config:
        raise UserError(f'{name} is a recipe of another command; ' + _other_command(config, name))
    changes, mixer = split_mixer(changes)
    if mixer:
        set_mixer(config, mixer)
    for field, text in changes:
        override(config, field, text)
    return config, options


def _other_command(config: ConfigDict, name: str) -> str:
    for section, command in COMMANDS.items():
        if section in config:
            return f'run python {command} --config={name}'
    return 'a recipe starts from lit_jax.recipes.default()'


def split_arguments(words: Sequence[str]) -> tuple[str, list[tuple[str, str | bool]]]:
    """(recipe, [(field, text)]) of `--config=NAME --config.a.b=TEXT`; the text may be a word of its own.

    A field without a text is switched on (True), one written --noconfig.a.b off (False)."""
    name, changes, stray, words = '', [], [], list(words)
    while words:
        word = words.pop(0)
        found = re.fullmatch(r'--?(no)?config(?:\.([\w.-]+))?(?:=(.*))?', word, re.DOTALL)
        if not found or (found[1] and not found[2]):
            stray.append(word)
            continue
        off, field, text = found.groups()
        if text is None and not off and words and not words[0].startswith('--'):
            text = words.pop(0)
        if field:
            changes.append((field, not off if text is None else text))
        else:
            name = text or ''
    if not name and len(stray) == 1 and _is_recipe(stray[0]):
        raise UserError(f'no recipe given; did you mean --config={stray[0]}?')
    if stray:
        raise UserError(f'unknown arguments: {" ".join(map(shown, stray))}; ' + _meant(stray[0]))
    if not name:
        raise UserError('no recipe given; try --config=digits_dit')
    return name, changes


def _is_recipe(word: str) -> bool:
    try:
        return bool(find_recipe(word))
    except UserError:
        return False


def _meant(word: str) -> str:
    name = word.lstrip('-')
    if '=' in name and '.' in name.partition('=')[0]:
        return f'did you mean --config.{name}?'
    return 'fields of the recipe are set with --config.NAME=VALUE'


def _describe_recipes() -> str:
    """The help of --config, with all recipes."""
    lines = ['recipe:',
             '  --config=NAME[:ROW]    a recipe of the list below or a file; ROW: one of several in a file',
             '  --config.FIELD=VALUE   overrides a field, for example --config.train.batch_size=64;',
             '                         --config=NAME --dry_run --verbose prints all fields', '',
             'recipes:']
    configs = shipped_folder('configs')
    for path in sorted(configs.rglob('*.py')):
        title = ' '.join(path.read_text(encoding='utf-8').split('"""')[1].split('\n\n')[0].split())
        name = path.relative_to(configs).with_suffix('').as_posix()
        lines.append(f'  {name:22} {textwrap.shorten(title, 84, placeholder=" ...")}')
    return '\n'.join(lines)
