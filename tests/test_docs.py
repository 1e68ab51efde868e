"""README and the pages of docs/ name only what is there: links, files, recipes, targets, extras.

test_pages.py runs their commands."""
import ast
import itertools
import re
import runpy
import tomllib
from pathlib import Path

import yaml
from pages import PAGES, README, ROOT, blocks

from lit_jax.runtime.errors import UserError

# Files that pages tell their readers to write.
EXAMPLES = {block.title for page in PAGES for block in blocks(page) if block.title}
FOLDERS = 'lit_jax|configs|docs|tests|examples|benchmarks|launch|docker|assets'
ENDINGS = 'py|md|png|sh|sbatch|txt|safetensors|Dockerfile'
NAMED = re.compile(rf'(?<![\w/.-])((?:{FOLDERS})/[\w/.{{}},-]*\w\.(?:{ENDINGS}))\b')
RECIPE = re.compile(r'(configs/[\w/.{},-]+\.py)(?::([\w.{},-]+))?')
SOURCES = [path for kind in ('*.py', '*.sh', '*.sbatch', 'Makefile')
           for folder in ('lit_jax', 'configs', 'examples', 'benchmarks', 'launch', 'tests')
           for path in (ROOT / folder).rglob(kind)] + [*ROOT.glob('*.py'), ROOT / 'Makefile']


def expand(text: str) -> list[str]:
    """configs/dit_{s,b}.py -> both."""
    parts = [part.split(',') if i % 2 else [part] for i, part in enumerate(re.split(r'\{(.*?)\}', text))]
    return [''.join(chosen) for chosen in itertools.product(*parts)]


def code(page: Path) -> str:
    """What a page writes as code: blocks and spans, a command on one line."""
    spans = re.findall(r'`([^`\n]+)`', page.read_text())
    return '\n'.join([*(block.text.replace('\\\n', ' ') for block in blocks(page)), *spans])


def recipe(file: str, row: str = ''):
    make = runpy.run_path(str(ROOT / file))['get_config']
    return make(row) if row else make()


def names(pattern: str) -> list[str]:
    return sorted({name for page in PAGES for name in re.findall(pattern, code(page), re.M)})


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 90


def test_links_and_files():
    missing = []
    for page in PAGES:
        text = page.read_text()
        links = re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', text)
        files = {name for found in NAMED.findall(text) for name in expand(found)} - EXAMPLES
        paths = [page.parent / link for link in links if '://' not in link]
        paths += [ROOT / name for name in files if 'NAME' not in name]
        missing += [(page.name, str(path)) for path in paths if not path.exists()]
    assert missing == []


def test_pages_that_the_code_names():
    named = [(path.name, name) for path in SOURCES if path != Path(__file__)
             for name in re.findall(r'\bdocs/[\w/]+\.(?:md|png)', path.read_text())]
    missing = [(path, name) for path, name in named if not (ROOT / name).exists()]
    assert missing == []


class _Reader(yaml.SafeLoader):
    """Takes !tags of mkdocs.yml as nothing."""


_Reader.add_multi_constructor('', lambda loader, suffix, node: None)


def leaves(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [leaf for item in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(item)]


def test_every_page_is_in_the_site_and_every_room_has_its_reference():
    listed = leaves(yaml.load((ROOT / 'mkdocs.yml').read_text(), _Reader)['nav'])
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / 'docs')) for page in PAGES if page != README)
    rooms = {path.parent.name for path in (ROOT / 'lit_jax').glob('*/__init__.py')
             if ast.get_docstring(ast.parse(path.read_text()))}
    assert rooms == {path.parent.name for path in (ROOT / 'lit_jax').glob('*/__init__.py')}
    assert {Path(name).stem for name in listed if name.startswith('reference/')} - {'index'} == rooms


def test_recipes():
    """Each recipe that a page names can be read, with its row."""
    wrong = []
    for path, rows in {found for page in PAGES for found in RECIPE.findall(page.read_text())}:
        for file, row in itertools.product(expand(path), expand(rows)):
            if file in EXAMPLES or '*' in row or row.endswith('_'):
                continue
            of_rows = file == 'configs/baselines.py' or file.startswith('configs/paper/')
            try:
                recipe(file, row) if row or not of_rows else (ROOT / file).stat()
            except (OSError, UserError) as error:
                wrong.append(f'{file}:{row}: {error}')
    assert wrong == []


def test_make_targets():
    assert [name for name in names(r'(?:^\s*|^)make ([a-z0-9-]+)')
            if not re.search(rf'^{name}:', (ROOT / 'Makefile').read_text(), re.M)] == []


def test_extras():
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'].get('optional-dependencies', {})
    assert {name for found in names(r'\.\[([\w,]+)\]') for name in found.split(',')} - set(extras) == set()


def test_modules_and_scripts():
    modules = [name for name in names(r'python -m ((?:lit_jax|examples)[\w.]*)')
               if not ((path := ROOT / name.replace('.', '/')).is_dir() or path.with_suffix('.py').exists())]
    scripts = [name for name in names(r'python (\w+)\.py') if not (ROOT / f'{name}.py').exists()]
    assert modules == scripts == []


def is_there(dotted: str) -> bool:
    """Whether lit_jax.a.b.name is a module, or a name that stands in the file of the module before it."""
    parts = dotted.split('.')
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        file = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
        if file.exists():
            return length == len(parts) or bool(re.search(rf'\b{parts[length]}\b', file.read_text()))
    return False


def test_names_of_the_package():
    dotted = {*names(r'\b(lit_jax(?:\.\w+)+)(?!/)')}
    dotted |= {f'{module}.{name}' for page in PAGES
               for module, imported in re.findall(r'from (lit_jax[\w.]*) import ([\w, ]+)', code(page))
               for name in re.split(r',\s*', imported.strip())}
    assert sorted(name for name in dotted if not is_there(name)) == []


def fields(config) -> set[str]:
    inner = {f'{key}.{name}' for key, value in config.items() if hasattr(value, 'items')
             for name in fields(value)}
    return set(config) | inner


def test_fields_of_recipes():
    """--config.a.b=... of every command is a field of a recipe that has it."""
    known = {name for file, row in (('configs/lit_s.py', ''), ('configs/vae_tiny.py', ''),
                                    ('configs/lit_xl_lightning.py', ''),
                                    ('configs/paper/dig_table3.py', 'four_directions'))
             for name in fields(recipe(file, row))}
    assert [name for name in names(r'--config\.([\w.]+)=') if name not in known] == []
