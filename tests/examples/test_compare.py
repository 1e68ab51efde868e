"""The comparison of all systems on digits."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.digits.compare import SYSTEMS, Entry, compare, table
from lit_jax.models.mixers import MIXERS
from lit_jax.recipes.recipe import finalize
from lit_jax.recipes.systems import SYSTEMS as PUBLISHED
from lit_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_system_and_every_mixer_is_compared():
    assert set(SYSTEMS) == set(PUBLISHED)
    assert {model['mixer']['name'] for _, model in SYSTEMS.values()} == set(MIXERS)


@pytest.mark.parametrize('name', SYSTEMS)
def test_recipes_differ_in_the_model_only(name):
    recipe, dit = (finalize(Entry(Path('x'), arm, 0).recipe(), 1).to_dict() for arm in (name, 'dit'))
    for one in (recipe, dit):
        del one['model'], one['name']
    assert recipe == dit


def test_the_table_shows_each_seed():
    row = {'name': 'lit', 'parameters': 330_760, 'macs': 3.588e6, 'step_ms': 41.26, 'distance': 1.5,
           'accuracy': 0.99, 'runs': [{'distance': 1.0}, {'distance': 2.0}]}
    assert table(
        {'rows': [row]}).splitlines()[-1] == '| lit | 330,760 | 3.59 | 41.3 | 1.50 | 1.00 / 2.00 | 0.990 |'


@pytest.mark.parametrize('systems, seeds, said', [
    (['ditt'], 1, 'unknown --systems: ditt; known: dit, '), (['dit'], 0, 'at least 1, got 0')])
def test_what_cannot_be_compared_is_refused(tmp_path, systems, seeds, said):
    with pytest.raises(UserError, match=said):
        compare(tmp_path / 'out', systems, seeds)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_short_comparison_from_start_to_report(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'examples.digits.compare', '--systems=lit,dit_kv',
                           '--seeds=2', '--steps=4',
                           f'--workdir={tmp_path}'], cwd=ROOT, text=True, capture_output=True, timeout=1200,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / 'figures.json').read_text())['rows']
    assert [row['name'] for row in rows] == ['lit',
                                             'dit_kv'] and all(len(row['runs']) == 2 and row['step_ms'] > 0
                                                               for row in rows)
    assert 'data:image/png' in (tmp_path
                                / 'report.html').read_text() and (
                                    tmp_path / 'table.md').read_text() in done.stdout
    assert Image.open(tmp_path / 'samples.png').size[0] > 300
