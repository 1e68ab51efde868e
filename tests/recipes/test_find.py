"""Recipes and shipped models are found by name from any folder, before anything heavy is imported."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_jax import recipes
from lit_jax.convert.torch_files import open_source
from lit_jax.diffusion.settings import recorded
from lit_jax.recipes import find
from lit_jax.runtime import shipped
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.own_modules import import_function
from lit_jax.runtime.paths import file_sha256

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name, file, row', [
    ('lit_xl', 'lit_xl.py', ''), ('lit_xl.py', 'lit_xl.py', ''), ('configs/lit_xl.py', 'lit_xl.py', ''),
    ('baselines:dig_xl', 'baselines.py', ':dig_xl'),
    ('configs/paper/table4.py:no_teacher', 'paper/table4.py', ':no_teacher'),
    ('paper/table4:xl_teacher_0.5_0.05', 'paper/table4.py', ':xl_teacher_0.5_0.05')])
def test_a_name_stands_for_a_file_that_ships(name, file, row):
    assert find.find_recipe(name) == f'{CONFIGS / file}{row}'


def test_a_recipe_of_ones_own_knows_what_lies_beside_it_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    folder = tmp_path / 'project' / 'recipes'
    folder.mkdir(parents=True)
    (folder / 'mixer_beside.py').write_text(
        'from lit_jax.models.mixers import SoftmaxAttention as ToyMixer\n')
    (folder / 'mine.py').write_text(
        'from pathlib import Path\n'
        'from lit_jax import recipes\n'
        'def get_config():\n'
        '    config = recipes.digits(recipes.default())\n'
        '    config.model.mixer = recipes.mixer("mixer_beside:ToyMixer", heads=2)\n'
        '    config.teacher.path = str(Path(__file__).parent / "teacher")\n'
        '    return config\n')
    monkeypatch.chdir(folder.parent)
    for name in ('recipes/mine.py', 'recipes/mine', str(folder / 'mine.py')):
        config = recipes.load_recipe(name)
        assert Path(config.teacher.path).resolve() == folder / 'teacher'
        assert recipes.architecture(config)['mixer']['name'] == 'mixer_beside:ToyMixer'
    monkeypatch.chdir('/')
    assert recipes.load_recipe(folder / 'mine.py').model.mixer.heads == 2


def test_what_a_program_of_ones_own_raises_is_told_with_its_line(tmp_path):
    class_of_its_own = 'class Strange(Exception): pass\nraise Strange("of its own")\n'
    (tmp_path / 'raises.py').write_text(class_of_its_own)
    with pytest.raises(UserError, match=r'raises\.py, line 2 does not run: of its own$'):
        recipes.load_recipe(tmp_path / 'raises.py')
    (tmp_path / 'exits.py').write_text('import sys\nsys.exit(0)\n')
    with pytest.raises(UserError, match=r'exits\.py, line 2 does not run: it ends the program$'):
        recipes.load_recipe(tmp_path / 'exits.py')
    (tmp_path / 'mixer_that_raises.py').write_text(class_of_its_own)
    sys.path.append(str(tmp_path))
    try:
        with pytest.raises(UserError, match=r'mixer_that_raises:Mine. cannot be imported: of its own'):
            import_function('the mixer', 'mixer_that_raises:Mine')
    finally:
        sys.path.remove(str(tmp_path))


def test_a_file_of_ones_own_goes_before(tmp_path):
    (tmp_path / 'configs').mkdir()
    for own in ('mine.py', 'configs/lit_xl.py', 'configs/dig_s.py'):
        (tmp_path / own).touch()
        assert find.find_recipe(f'{own}:row') == f'{own}:row'


@pytest.mark.parametrize('old, new', [
    ('configs/dig_xl.py', 'dig_xl'), ('dig_xl', 'dig_xl'), ('dig_xl_512', 'dig_xl_512'),
    ('configs/udig_s.py', 'udig_s'), ('dydi_lit_l.py', 'dydi_lit_l'), ('sana_b', 'sana_b'),
    ('edit_b', 'edit_b'),
    ('configs/moh_dit_b.py', 'moh_dit_b'), ('configs/moh_dit_b.py:90', 'moh_dit_b'),
    ('configs/moh_dit_b.py:75', 'moh_dit_b_75'), ('dit_kv_l', 'dit_kv_l')])
def test_the_old_name_of_a_row_answers_with_the_new_one(old, new):
    with pytest.raises(UserError, match=rf'^{old} is now configs/baselines\.py:{new}$'):
        find.find_recipe(old)


@pytest.mark.parametrize('name, message', [
    ('lit_xxl', 'the recipe lit_xxl does not exist; .*such as lit_xl'),
    ('tabel4:row', 'such as .*paper/table4'), ('', 'such as baselines, digits_dit'),
    ('runs/mine.py', 'the recipe runs/mine.py does not exist')])
def test_an_unknown_name_is_answered_with_those_near_it(name, message):
    with pytest.raises(UserError, match=message):
        find.find_recipe(name)


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, 'PACKAGE', tmp_path)
    (tmp_path / '_configs').mkdir()
    (tmp_path / '_configs' / 'lit_xl.py').touch()
    (tmp_path / '_assets').mkdir()
    assert find.find_recipe('lit_xl') == f'{tmp_path}/_configs/lit_xl.py'
    assert shipped.find_asset('assets/shapes_t5') == tmp_path / '_assets' / 'shapes_t5'


def test_what_ships_is_there():
    for name in ('digits_dit.safetensors', 'mnist_10k.npz', 'shapes_pixart.safetensors', 'assets/shapes_t5'):
        assert shipped.find_asset(name).exists()


@pytest.mark.parametrize('name', ['digits_dit', 'shapes_pixart'])
def test_shipped_models_are_drawn_as_their_recipes_draw_and_their_cards_are_theirs(name):
    file = shipped.find_asset(f'{name}.safetensors')
    card, told = json.loads(file.with_suffix('.json').read_text()), open_source(file).config['sampling']
    stage = ':refine' if name == 'shapes_pixart' else ''
    assert told == card['sampling'] == recorded(recipes.load_recipe(name + stage).sample)
    drawn = {field: card.get('samples', card['figures'].get('samples'))[field] for field in told}
    assert drawn == told and card['sha256'] == file_sha256(file)


def test_finding_imports_nothing_heavy():
    code = ('import sys; from lit_jax.recipes.find import find_recipe; find_recipe("lit_xl"); '
            'print(sorted({"jax", "flax", "ml_collections", "numpy"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], cwd=CONFIGS.parent, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stderr
