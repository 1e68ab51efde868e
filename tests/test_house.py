"""House rules that a machine can see, so that review can look at the rest."""
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / 'lit_jax').rglob('*.py'), *ROOT.glob('*.py')])
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


@pytest.mark.parametrize('name', REFUSED)
def test_refused_forms_are_absent(name):
    hits = [f'{path.relative_to(ROOT)}:{number}' for path in SOURCES
            for number, line in enumerate(path.read_text().splitlines(), 1) if re.search(REFUSED[name], line)]
    assert hits == []


def test_files_are_small():
    assert [p.name for p in SOURCES if len(p.read_text().splitlines()) > 600] == []


def test_scripts_hold_no_logic():
    assert [p.name for p in ROOT.glob('*.py') if len(p.read_text().splitlines()) > 150] == []


def importers(pattern, but=()):
    return sorted(str(p.relative_to(ROOT)) for p in SOURCES
                  if re.search(pattern, p.read_text(), re.M) and p.name not in but)


def test_only_arrays_and_the_manager_import_orbax():
    assert importers(r'^\s*(import|from) orbax') == ['lit_jax/checkpoint/arrays.py',
                                                     'lit_jax/checkpoint/manager.py']


def test_torch_is_never_imported_at_import_time():
    assert importers(r'^(import|from) (torch|diffusers|transformers)\b') == []


def test_nnx_stays_inside_the_models():
    outside = [path for path in importers(r'^from flax') if not path.startswith('lit_jax/models/')]
    assert outside == []


@pytest.mark.parametrize('package, may_not', [
    ('models', 'diffusion|checkpoint|training|data|evaluation|sampling'),
    ('diffusion', 'models|checkpoint|training|data'),
    ('data', 'models|training|checkpoint|diffusion'),
    ('checkpoint', 'training|data|evaluation|sampling|demo'),
    ('training', 'demo'), ('evaluation', 'training|demo')])
def test_imports_point_one_way(package, may_not):
    pattern = rf'^\s*from lit_jax\.({may_not})\b'
    assert [path for path in importers(pattern) if path.startswith(f'lit_jax/{package}/')] == []


def test_ruff_is_clean():
    ruff = pytest.importorskip('ruff', reason='ruff comes with the extra test')
    done = subprocess.run([ruff.find_ruff_bin(), 'check', '--no-cache', '.'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
