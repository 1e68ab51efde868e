"""configs/paper/: every row of the tables is a recipe, with the figure that the paper prints beside it."""
import re
import runpy
from pathlib import Path

import pytest
from recipe_networks import network_of

from lit_jax import recipes
from lit_jax.models.cost import paper_macs
from lit_jax.recipes.paper import printed
from lit_jax.recipes.systems import SYSTEMS
from lit_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / 'configs' / 'paper').glob('*table*.py'))
PAPERS = {'table': 'LiT', 'dig_table': 'DiG', 'dydi_table': 'DyDi-LiT'}


def rows_of(path):
    return runpy.run_path(str(path))['ROWS']


@pytest.mark.parametrize('path', TABLES, ids=lambda path: path.stem)
def test_every_row_is_a_whole_recipe_with_its_published_figures(path):
    for name, row in rows_of(path).items():
        config = recipes.finalize(recipes.load_recipe(f'{path}:{name}'), device_count=16)
        network_of(config)
        assert config.name == f'{path.stem}_{name}'
        assert config.published.fid == row.published['fid'] and 1 < config.published.fid < 180
        assert config.published.table.startswith(f'{PAPERS[path.stem[:-1]]} (arXiv ')
        assert config.published.table.endswith(f'table {path.stem[-1]}, row {name}')
        assert config.eval.cfg_scales == (row.cfg_scale,
                                          ) and config.eval.steps == (200 if row.sub_imagenet else 250)
        assert all(0 < row.published[name] < 1 for name in ('precision', 'recall', 'kid', 'skid')
                   if name in row.published)


def test_the_tables_have_the_rows_of_the_paper():
    counts = {path.stem: len(rows_of(path)) for path in TABLES}
    # Table 3 prints the 400K row twice; 6 and 7: the rows of LiT, DiT and SiT.
    assert counts == {'table1': 10, 'table2': 20, 'table3': 11, 'table4': 9, 'table5': 12, 'table6': 7,
                      'table7': 6,
                      'dig_table3': 6, 'dig_table4': 12, 'dig_table5': 7, 'dig_table6': 2,
                      'dydi_table1': 36, 'dydi_table2': 12, 'dydi_table3': 12, 'dydi_table4': 6,
                      'dydi_table5': 2, 'dydi_table6': 2, 'dydi_table7': 12, 'dydi_table8': 9}


def test_the_best_row_of_table_4_is_the_recipe_of_the_paper():
    config = recipes.load_recipe('paper/table4:xl_teacher_0.5_0.05')
    assert (config.teacher.lambda_noise, config.teacher.lambda_variance) == (0.5, 0.05)
    assert (config.teacher.path, config.inherit.path) == ('models/dit_xl', 'models/dit_s_800k')
    assert (config.published.fid, config.published['is']) == (50.79, 29.17)
    assert config.model.mixer.heads == 2 and config.train.steps == 400_000


@pytest.mark.parametrize('table, row',
                         [('dydi_table5', 'maps'), ('dydi_table5', 'tokens'), ('dig_table3', 'causal'),
                          ('dig_table3', 'four_directions')])
def test_printed_costs_of_variants_are_reproduced(table, row):
    config = recipes.load_recipe(f'paper/{table}:{row}')
    convention = SYSTEMS['dig' if table.startswith('dig') else 'dydi_lit'].convention
    macs = paper_macs(network_of(config), convention)
    assert macs / 1e9 == pytest.approx(config.published.gflops, rel=5e-3)


@pytest.mark.parametrize('table, image_size',
                         [('dydi_table1', 256), ('dydi_table2', 512), ('dydi_table7', 256)])
def test_printed_costs_are_those_of_the_table_of_systems(table, image_size):
    for row in rows_of(ROOT / 'configs' / 'paper' / f'{table}.py').values():
        assert row.published['gflops'] == SYSTEMS[row.system].published[row.size, image_size]


def test_sub_imagenet_and_its_exceptions():
    path = ROOT / 'configs' / 'paper' / 'dydi_table2.py'
    for name in rows_of(path):
        config = recipes.load_recipe(f'{path}:{name}')
        assert (config.data.classes, config.data.num_classes,
                config.data.image_size) == ('sub_imagenet', 100, 512)
        assert (config.train.steps, config.eval.labels, config.eval.steps) == (100_600, 'balanced', 200)
        assert config.train.dtype == ('float32' if name.startswith('dig') else 'bfloat16')


def test_the_parts_of_dydi_lit_are_added_one_by_one():
    path = ROOT / 'configs' / 'paper' / 'dydi_table4.py'
    parts = {name: recipes.load_recipe(f'{path}:{name}').model.mixer for name in rows_of(path)}
    assert list(parts) == ['sana', 'focused_kernel', 'dynamic_measure_kernel', 'dynamic_projection',
                           'token_differential', 'reparameterization']
    assert parts.pop('sana').name == 'sana'
    assert [(p.powers > 0, p.projectors > 0, p.difference, p.dwc) for p in parts.values()] == [
        (False, False, 'none', 'none'), (True, False, 'none', 'none'), (True, True, 'none', 'none'),
        (True, True, 'tokens', 'single'), (True, True, 'tokens', 'branches')]
    started = recipes.load_recipe('paper/dydi_table6:increasing').model.stages
    assert [stage['mixer']['factor_init']
            for stage in started] == [.2, .275, .35, .425, .5, .575, .65, .725, .8]


def test_a_printed_line():
    assert printed('fid is% kid recall%', '1.5 - 0.01 43.54',
                   gflops=6.0) == {'fid': 1.5, 'kid': .01, 'recall': .4354, 'gflops': 6}
    with pytest.raises(ValueError, match='zip'):
        printed('fid', '1 2')


@pytest.mark.parametrize('row', ['', 'xl_teacher_9_9'])
def test_an_unknown_row_lists_the_known_ones(row):
    with pytest.raises(UserError,
                       match=re.escape('configs/paper/table4.py:no_teacher; its rows: no_teacher, '
                                       's_teacher_0.1_0')):
        recipes.load_recipe(f'paper/table4:{row}')


def test_models_are_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv('LIT_JAX_MODELS', 'gs://bucket/models/')
    assert recipes.load_recipe('lit_xl').teacher.path == 'gs://bucket/models/dit_xl'
