"""The notebooks of examples/: whole, without outputs, and each runs from top to bottom in a fresh process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'examples' / 'notebooks').glob('*.ipynb'))


def cells(notebook):
    return json.loads(notebook.read_text())['cells']


def code(notebook):
    return '\n\n'.join(''.join(cell['source']) for cell in cells(notebook) if cell['cell_type'] == 'code')


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_compile_and_hold_no_outputs(notebook):
    compile(code(notebook), notebook.name, 'exec')
    found = cells(notebook)
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in found)
    assert 'TPU or GPU runtime' in ''.join(found[0]['source'])
    assert all(len(line) <= 140 for cell in found for line in cell['source'])


def test_they_are_there():
    assert {path.stem for path in NOTEBOOKS} == {'load_draw_look', 'make_your_dit_linear', 'your_own_mixer'}
    assert len(cells(ROOT / 'examples' / 'notebooks' / 'load_draw_look.ipynb')) == 10


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    done = subprocess.run([sys.executable, '-c', code(notebook)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
