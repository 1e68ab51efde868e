"""Finds recipes by name, from any folder, without importing jax: a typing error is reported at once."""
import difflib
import re
from pathlib import Path

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.shipped import shipped_folder

# Names of files that have become rows of baselines.py.
_MOVED = re.compile(r'(?P<row>(u?dig|moh_dit)_(s|b|l|xl)|(dydi_lit|sana|edit|dit_kv)_(s|b|l)|dig_xl_512)')


def find_recipe(name: str) -> str:
    """The file of a recipe, with its row: PATH or PATH:ROW, as config_flags takes it.

    name: a path, or a shipped recipe: lit_xl, lit_xl.py, configs/lit_xl.py, paper/table4:ROW. Raises
    UserError for an unknown name, with similar ones."""
    path, colon, row = name.partition(':')
    if Path(path).is_file():
        return name
    configs = shipped_folder('configs')
    short = path.removeprefix('configs/').removesuffix('.py')
    if moved := _MOVED.fullmatch(short):
        row = moved['row'] + (f'_{row}' if row not in ('', '90') else '')
        raise UserError(f'{name} is now configs/baselines.py:{row}')
    if short and (configs / f'{short}.py').is_file():
        return f'{configs / short}.py{colon}{row}'
    known = sorted(file.relative_to(configs).with_suffix('').as_posix() for file in configs.rglob('*.py'))
    spellings = {name.rpartition('/')[2]: name for name in known} | {name: name for name in known}
    near = dict.fromkeys(spellings[match] for match in difflib.get_close_matches(short, spellings))
    near = near or dict.fromkeys(name for name in known if '/' not in name)
    raise UserError(f'the recipe {name} does not exist; give a path, or a name such as {", ".join(near)}')
