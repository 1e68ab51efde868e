"""Every number of every recipe has a range, and nothing outside of it reaches a compiler."""
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.models.arch import check_arch
from lit_jax.recipes.fields import RANGES, check_fields
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.ranges import Range, flattened
from lit_jax.training import vae_training

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = sorted(CONFIGS.rglob('*.py'))
NAN, INF = float('nan'), float('inf')
HOSTILE = (NAN, INF, -INF, 2 ** 70, -2 ** 70, True, 'a', None, (1, 2), [], {'a': 1})


def recipes_of(path):
    rows = runpy.run_path(str(path)).get('ROWS')
    return [recipes.load_recipe(name) for name in ([f'{path}:{row}' for row in rows] if rows else [path])]


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(config):
    return {name for name, value in flattened(config.to_dict())
            if is_number(value) and not name.startswith('published')}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_every_number_of_every_recipe_is_in_the_table_and_in_its_range(path):
    for config in recipes_of(path):
        assert numbers(config) <= set(RANGES)
        for name, value in flattened(config.to_dict()):
            if name in RANGES and value is not None:      # None: the teacher's, in configs/student.py
                assert RANGES[name].holds(value), name


def changed(config, name, value):
    section = config
    *parts, last = name.removesuffix('[]').split('.')
    for part in parts:
        section = section[part]
    with config.unlocked(), config.ignore_type():
        section[last] = (value,) if name.endswith('[]') else value
    return config


def outside(known: Range):
    """Values next to the ends, and hostile ones."""
    step = 1 if known.whole else 1e-9
    ends = [known.low if known.above else known.low - step,
            known.high if known.below else known.high * (1 + 1e-9) + 1]
    kinds = [1.5] if known.whole else []
    return [value for value in (*ends, *HOSTILE, *kinds)
            if not known.holds(value) and (known.whole or value is not True)]   # ConfigDict makes it 1.0


@pytest.mark.parametrize('name', sorted(numbers(tiny_recipe())))
def test_a_number_out_of_its_range_is_refused_by_its_name(name):
    for value in outside(RANGES[name]):
        if (name, value) == ('model.depth', None):      # a student's recipe before it knows its teacher
            continue
        with pytest.raises(UserError) as raised:
            recipes.finalize(changed(tiny_recipe(), name, value), device_count=8)
        assert name.removesuffix('[]') in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize('name', sorted(numbers(vae_training.default())))
def test_the_same_for_the_training_of_a_vae(name):
    for value in outside(RANGES[name]):
        with pytest.raises(UserError, match=name.removesuffix('[]')):
            check_fields(changed(vae_training.default(), name, value), vae_training.default())


def test_sections_and_kinds():
    for section in ('train', 'data', 'model', 'eval', 'mesh'):
        for value in (ConfigDict(), None, 3, 'a'):
            with pytest.raises(UserError, match=section):
                recipes.finalize(changed(tiny_recipe(), section, value), device_count=8)
    for field, value in (('train.scan_layers', 1), ('data.path', None), ('model.family', {}),
                         ('model.mixer', 3), ('eval.cfg_scales', 1.5), ('model.mixer.name', []),
                         ('model.learn_sigma', 'yes'), ('model.mixer.qkv_bias', 'no'), ('train.dtype', 3)):
        with pytest.raises(UserError, match=field.split('.')[-1]):
            recipes.finalize(changed(tiny_recipe(), field, value), device_count=8)
    for other in ({}, None, [], 'lit_xl'):
        with pytest.raises(UserError, match='starts from recipes.default'):
            recipes.finalize(other, device_count=8)


@pytest.mark.parametrize('name', ['depth', 'width', 'patch', 'channels', 'num_classes', 'mlp_ratio', 'mixer',
                                  'input_size', 'learn_sigma', 'family', 'ffn', 'stages'])
def test_an_architecture_from_a_file_is_checked_alike(name):
    arch = recipes.architecture(tiny_recipe())
    for value in (*HOSTILE, 10 ** 400, 0, -1, [[1, 2]], {'name': [1]}):
        if (name, value) in (('learn_sigma', True), ('stages', [])):
            continue
        with pytest.raises(UserError):
            check_arch({**arch, name: value})


def test_a_range_says_itself():
    assert str(Range(1)) == 'a whole number from 1 on'
    assert str(Range(0, 1, whole=False, below=True)) == 'a number at least 0 and below 1'
    assert str(Range(1, 9, also=('all',))) == "a whole number at least 1 and at most 9 or 'all'"
