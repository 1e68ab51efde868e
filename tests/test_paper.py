"""configs/paper/: every row of the tables is a recipe, with the figure that the paper prints beside it."""
import re
import runpy
from pathlib import Path

import pytest

from lit_jax import config as recipes
from lit_jax.errors import UserError
from lit_jax.models.network import Network

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / 'configs' / 'paper').glob('table*.py'))


def rows_of(path):
    return runpy.run_path(str(path))['ROWS']


@pytest.mark.parametrize('path', TABLES, ids=lambda path: path.stem)
def test_every_row_is_a_whole_recipe_with_its_published_figures(path):
    for name, row in rows_of(path).items():
        config = recipes.finalize(recipes.load_recipe(path, name), device_count=16)
        Network(recipes.architecture(config))
        assert config.name == f'{path.stem}_{name}'
        assert config.published.fid == row.published['fid'] and 1 < config.published.fid < 120
        assert config.published.table.endswith(f'table {path.stem[-1]}, row {name}')


def test_the_tables_have_the_rows_of_the_paper():
    counts = {path.stem: len(rows_of(path)) for path in TABLES}
    # Table 3 prints the 400K row twice; 6 and 7: the rows of LiT and DiT.
    assert counts == {'table1': 10, 'table2': 20, 'table3': 11, 'table4': 9, 'table5': 12, 'table6': 6, 'table7': 5}


def test_the_best_row_of_table_4_is_the_recipe_of_the_paper():
    config = recipes.load_recipe(ROOT / 'configs' / 'paper' / 'table4.py', 'xl_teacher_0.5_0.05')
    assert (config.teacher.lambda_noise, config.teacher.lambda_variance) == (0.5, 0.05)
    assert (config.teacher.path, config.inherit.path) == ('models/dit_xl', 'models/dit_s_800k')
    assert (config.published.fid, config.published['is']) == (50.79, 29.17)
    assert config.model.mixer.heads == 2 and config.train.steps == 400_000


@pytest.mark.parametrize('row', ['', 'xl_teacher_9_9'])
def test_an_unknown_row_lists_the_known_ones(row):
    with pytest.raises(UserError, match=re.escape('configs/paper/table4.py:no_teacher; its rows: no_teacher, s_teacher_0.1_0')):
        recipes.load_recipe(ROOT / 'configs' / 'paper' / 'table4.py', row)


def test_models_are_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv('LIT_JAX_MODELS', 'gs://bucket/models/')
    assert recipes.load_recipe(ROOT / 'configs' / 'lit_xl.py').teacher.path == 'gs://bucket/models/dit_xl'
