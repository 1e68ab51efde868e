"""Finds recipes by name, from any folder, without importing jax: a typing error is reported at once."""
import difflib
import os
import re
from pathlib import Path

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.shipped import shipped_folder

# Names of files that have become rows of baselines.py.
_MOVED = re.compile(r'(?P<row>(u?dig|moh_dit)_(s|b|l|xl)|(dydi_lit|sana|edit|dit_kv)_(s|b|l)|dig_xl_512)')


def find_recipe(name: str) -> str:
    """The file of a recipe, with its row: PATH or PATH:ROW.

    name: a path, or a shipped recipe: lit_xl, lit_xl.py, configs/lit_xl.py, paper/table4:ROW. Raises
    UserError for an unknown name, with similar ones."""
    path, colon, row = name.partition(':')
    if path.startswith('~'):
        path = os.path.expanduser(path)
    for file in (path, f'{path}.py'):
        if path and Path(file).is_file():
            return file + colon + row
    configs = shipped_folder('configs')
    short = path.removeprefix('configs/').removesuffix('.py')
    if moved := _MOVED.fullmatch(short):
        row = moved['row'] + (f'_{row}' if row not in ('', '90') else '')
        raise UserError(f'{name} is now configs/baselines.py:{row}')
    if short and (configs / f'{short}.py').is_file():
        return f'{configs / short}.py{colon}{row}'
    known = sorted(file.relative_to(configs).with_suffix('').as_posix() for file in configs.rglob('*.py'))
    spellings = {name.rpartition('/')[2]: name for name in known} | {name: name for name in known}
    alike = difflib.get_close_matches(short.rpartition('/')[2], spellings)
    near = dict.fromkeys(spellings[match] for match in alike)
    near = near or dict.fromkeys(name for name in known if '/' not in name)
    is_path = ('/' in path or path.endswith('.py')) and not path.startswith('/')
    where = f' in {Path.cwd()}' if is_path else ''
    raise UserError(f'the recipe {name} does not exist{where}; give a path, or a name such as '
                    f'{", ".join(near)}')
