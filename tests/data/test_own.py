"""A data set of one's own, named package.module:function."""
from types import SimpleNamespace

import numpy as np
import pytest

from lit_jax.analysis.examples import data_recipe
from lit_jax.data.base import ArraySource, Spec
from lit_jax.data.sources import Asked, open_source
from lit_jax.recipes.recipe import default
from lit_jax.runtime.errors import UserError

SPEC = Spec(image_size=4, channels=1, num_classes=2, class_names=('a', 'b'))


def open_own(request: Asked):
    return ArraySource(SPEC, np.full((6, 4, 4, 1), request.split == 'train'), np.arange(6) % 2)


def open_nothing(request):
    return None


def open_raising(request):
    raise OSError('no such disk')


def test_a_function_opens_it(tmp_path):
    train, held_out = (open_source(f'{__name__}:open_own', split=split, num_classes=2)
                       for split in ('train', 'held_out'))
    assert train.spec == SPEC and train[0]['image'].mean() == 1 and held_out[0]['image'].mean() == 0
    (tmp_path / 'list.txt').write_text('b\n')
    chosen = open_source(f'{__name__}:open_own', classes=str(tmp_path / 'list.txt'), num_classes=1)
    assert chosen.class_names == ['b'] and len(chosen) == 3


@pytest.mark.parametrize('name, says', [
    ('nowhere:open_own', 'the data set .nowhere:open_own. cannot be imported: No module named'),
    (f'{__name__}:open_n', 'is no function of that module'),
    (f'{__name__}:open_raising', r'does not open \(.*test_own.py, line \d+\): no such disk'),
    (f'{__name__}:open_nothing', 'must return a lit_jax'),
    ('mine', r'unknown data.name .mine.*package.module:function'), ('mine:', 'unknown data.name')])
def test_what_is_none_is_told(name, says):
    with pytest.raises(UserError, match=says):
        open_source(name)


def test_numbers_of_the_recipe_must_be_its_own():
    with pytest.raises(UserError, match='has num_classes 2, the recipe asks for 3'):
        open_source(f'{__name__}:open_own', num_classes=3)


def test_a_workdir_does_not_get_to_import_one():
    recipe = default()
    recipe.data.name = 'nowhere:open_own'
    model = SimpleNamespace(config={'recipe': recipe.to_dict(), 'diffusion': recipe.diffusion.to_dict()})
    with pytest.raises(UserError, match='a workdir does not get to import a module.*--data=nowhere:open_own'):
        data_recipe(model, 'runs/own')
    recipe = data_recipe(model, 'runs/own', data=f'{__name__}:open_own', vae='models/vae')
    assert recipe.data.name == f'{__name__}:open_own'
