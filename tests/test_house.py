"""House rules that a machine can see, so that review can look at the rest."""
import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / 'lit_jax').rglob('*.py'))
SOURCES = sorted([*PACKAGE, *ROOT.glob('*.py')])
REFUSED = {
    'private imports': r'(jax\._src|optax\._src|flax\.core)',
    'star imports': r'^from .* import \*',
    'nnx transforms':
    r'nnx\.(jit|grad|value_and_grad|scan|remat|Optimizer|StateAxes|with_partitioning|Sequential|List)\b',
    'pickle': r'(pickle\.loads?\(|allow_pickle=True|weights_only=False)',
    'blanket silence': r'(filterwarnings\(.ignore.\)|except Exception:\s*$|except:\s*$)',
    'open ends': r'(TODO|FIXME|XXX|NotImplementedError)',
    'dead names': r'(jax\.tree_map|jax\.experimental\.shard_map|\bpmap\b|VariableState)',
}
# From the ground up: a room imports only rooms before it.
ROOMS = ('runtime', 'report', 'models', 'diffusion', 'data', 'text', 'metrics', 'recipes', 'checkpoint',
         'convert', 'sampling', 'latents', 'evaluation', 'deploy', 'training', 'plan', 'analysis',
         'app', 'commands')
# Functions of more than 60 lines, and why.
LONG = {
    'recipe.py default': 'every field of a recipe, with its default and meaning, is read in one place',
}
MOST_MODULES = 119      # of ours, behind `import lit_jax.training.loop`: the others come in when used


@pytest.mark.parametrize('name', REFUSED)
def test_refused_forms_are_absent(name):
    hits = [f'{path.relative_to(ROOT)}:{number}' for path in SOURCES
            for number, line in enumerate(path.read_text().splitlines(), 1) if re.search(REFUSED[name], line)]
    assert hits == []


def test_only_one_module_reads_json_and_lines():
    """`str.splitlines` splits inside of lines too (U+2028), and json.loads has no limits."""
    others = [path for path in (*SOURCES, *(ROOT / 'examples').rglob('*.py'))
              if path.name not in ('json_file.py', 'draw_twin.py')]      # the latter runs without lit_jax
    assert [f'{path.relative_to(ROOT)}:{number}' for path in others
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if re.search(r'json\.loads?\(|\.splitlines\(', line)] == []


def test_messages_show_values_escaped_and_no_class_names():
    """`shown` and `reason_of` (lit_jax/runtime/errors.py) escape and shorten what comes from elsewhere."""
    hits = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'UserError':
                parts = [part for part in ast.walk(node) if isinstance(part, ast.FormattedValue)]
                hits += [f'{path.relative_to(ROOT)}:{part.lineno}' for part in parts
                         if part.conversion == ord('r')
                         or re.search(r'(?<!\w)type\(', ast.unparse(part.value))]
    assert hits == []


def test_shapes_in_docstrings_are_code():
    """Outside of backticks, [images][layers] is a Markdown link, which the site looks for in vain."""
    hits = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = re.sub(r'`[^`]*`', '', ast.get_docstring(node) or '')
                hits += [f'{path.relative_to(ROOT)}:{node.body[0].lineno}'] if '][' in text else []
    assert hits == []


def test_files_are_small():
    assert [p.name for p in SOURCES if len(p.read_text().splitlines()) > 600] == []


def test_scripts_hold_no_logic():
    assert [p.name for p in ROOT.glob('*.py') if len(p.read_text().splitlines()) > 150] == []


def test_scripts_listen_to_signals_before_anything_else():
    """Blocked on the first line, caught by what imports little, and only then the slow imports."""
    first = ['import signal', 'signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))',
             'from lit_jax.runtime import signals', 'signals.catch()']
    for path in ROOT.glob('*.py'):
        _, main = ast.parse(path.read_text()).body
        assert isinstance(main, ast.If) and [ast.unparse(line) for line in main.body[:4]] == first, path.name
    code = 'import sys, lit_jax.runtime.signals; print({"logging", "typing", "pathlib"} & {*sys.modules})'
    said = subprocess.run([sys.executable, '-S', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == 'set()\n', said.stderr


def test_no_two_files_share_a_name():
    names = Counter(path.name for path in PACKAGE if path.name != '__init__.py')
    assert [name for name, count in names.items() if count > 1] == []


def test_no_class_is_called_request():
    """Seven were: each says now what it asks for."""
    assert [path.name for path in PACKAGE if re.search(r'^class Request\b', path.read_text(), re.M)] == []


def test_long_functions_have_a_reason():
    long = {f'{path.name} {node.name}' for path in PACKAGE for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60}
    assert long == set(LONG)


def importers(pattern, but=()):
    return sorted(str(p.relative_to(ROOT)) for p in SOURCES
                  if re.search(pattern, p.read_text(), re.M) and p.name not in but)


def test_only_arrays_and_the_manager_import_orbax():
    assert importers(r'^\s*(import|from) orbax') == ['lit_jax/checkpoint/arrays.py',
                                                     'lit_jax/checkpoint/manager.py']


def test_torch_is_never_imported_at_import_time():
    pieces = 'lit_jax/convert/twins/'       # text that exports carry, which nothing imports
    assert [path for path in importers(r'^(import|from) (torch|diffusers|transformers)\b')
            if not path.startswith(pieces)] == []
    assert [path for path in importers(r'^\s*from lit_jax.convert.twins')
            if not path.startswith(pieces)] == []


def test_nnx_stays_inside_the_models():
    outside = [path for path in importers(r'^from flax') if not path.startswith('lit_jax/models/')]
    assert outside == []


def rooms_of(path):
    """The rooms that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split('.')[1] for name in names if name.startswith('lit_jax.'))


def test_imports_point_one_way():
    assert {path.parent.name for path in (ROOT / 'lit_jax').glob('*/__init__.py')} == set(ROOMS)
    up = [f'{path.relative_to(ROOT)} imports {room}' for place, name in enumerate(ROOMS)
          for path in sorted((ROOT / 'lit_jax' / name).rglob('*.py')) for room in rooms_of(path)
          if room in ROOMS[place + 1:]]
    assert up == []


def test_a_training_run_imports_what_it_uses():
    code = ('import sys, lit_jax.training.loop; '
            'print(sum(name.partition(".")[0] == "lit_jax" for name in sys.modules))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= MOST_MODULES


def test_ruff_is_clean():
    ruff = pytest.importorskip('ruff', reason='ruff comes with the extra test')
    done = subprocess.run([ruff.find_ruff_bin(), 'check', '--no-cache', '.'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
