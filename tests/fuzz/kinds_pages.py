"""Kinds of input that a person writes: recipes, and what reaches the page through its API."""
import json
import math
import sys
from unittest import mock

import text_models
from absl import flags
from fuzz.kinds import Kind
from fuzz.kinds_weights import _model
from fuzz.mutations import HOSTILE, Done, edit_text

from lit_jax import recipes
from lit_jax.app.drawing import open_studio
from lit_jax.app.layout import read_request
from lit_jax.commands.recipe_flags import parse_recipe
from lit_jax.commands.train import TrainOptions

_RECIPE = '''import lit_jax.recipes as recipes


def get_config():
    config = recipes.load_recipe('digits_dit')
    {line}
    return config
'''
_BODIES = ('return None', 'return {}', 'return 7', 'raise ValueError("\\x1b[2J" + "x" * 100000)', '1 / 0',
           'return get_config()', 'del config["train"]', 'config.model = {}',
           'config.train = {}', 'config.data = None', 'import nowhere', '(', 'config.nothing = 1',
           'config = recipes.default(1)', 'assert False', 'raise Exception')
_NUMBERS = (float('nan'), float('inf'), -float('inf'), -1, -1.5, 0, 2 ** 70, -2 ** 70, 1e300, 1e-300, True)


def _recipe(folder):
    (folder / 'recipe.py').write_text(_RECIPE.format(line='pass'))
    return folder / 'recipe.py'


def _other_recipe(path, rng):
    """One field with another value, or a program that does not return a recipe."""
    fields = list(_leaves(recipes.load_recipe('digits_dit').to_dict()))
    if rng.random() < 0.2:
        line = _BODIES[rng.integers(len(_BODIES))]
    else:
        name, value = fields[rng.integers(len(fields))]
        number = isinstance(value, int | float) and rng.random() < 0.7
        value = _NUMBERS[rng.integers(len(_NUMBERS))] if number else HOSTILE[rng.integers(len(HOSTILE))]
        shown = f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else ascii(value)
        line = f'config.ignore_type().__enter__(); config.{name} = {shown}' if rng.random() < 0.5 else \
            f'config.{name} = {shown}'
    path.unlink()
    path.write_text(_RECIPE.format(line=line))
    return Done(path.name, line[:80], False)


def _leaves(tree: dict, prefix: str = ''):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def _read_recipe(path, _):
    """Fields whose value no run can mean: these must be refused."""
    flags.FLAGS.__dict__['__flags'].pop('config', None)
    with mock.patch.object(sys, 'argv', ['train.py', f'--config={path}']):
        config, _ = parse_recipe(TrainOptions)
    config = recipes.finalize(config, 1)
    usual = dict(_leaves(recipes.load_recipe('digits_dit').to_dict()))
    return [name for name, value in _leaves(config.to_dict()) if name in usual and _odd(value, usual[name])]


def _odd(value, usual) -> bool:
    """No number where one is usual, NaN, infinite or negative."""
    if isinstance(usual, bool) or not isinstance(usual, int | float):
        return False
    return isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf


def _request(values):
    def make(folder):
        (folder / 'request.json').write_text(json.dumps(values))
        return folder / 'request.json'
    return make


def _page(maker, values):
    """(make, read) of requests to the page of a model."""
    studios = {}

    def make(folder):
        studios['of'] = None, folder
        return _request(values)(folder)

    def read(path, folder):
        if not studios.get('open'):
            studios['open'] = maker(folder)
        studio, given = studios['open'], json.loads(path.read_text())
        if not isinstance(given, list) or len(given) != len(values):
            return None         # gradio hands on as many values as there are controls
        request = read_request(studio.takes, given)
        studio.check(request)
        return request
    return make, read


def _other_values(path, rng):
    text, what = path.read_text(), ''
    while True:
        new, what = edit_text(text, rng)
        try:
            if isinstance(json.loads(new), list):
                break
        except (ValueError, RecursionError):
            continue
    path.unlink()
    path.write_bytes(new)
    return Done(path.name, what, False)


_CLASSES = _page(lambda folder: open_studio(_model(folder)), [1, 0, 2, 10, 'ddim', 1.5])
_PROMPTS = _page(lambda folder: open_studio(**text_models.save_system(folder / 'system', space='pixels')),
                 ['a red square', '', 0, 2, 10, 'dpm++', 4.5, 8, 8])

KINDS = (
    Kind('recipe', _recipe, _read_recipe, 'whole', runs=True, named=False, mutate=_other_recipe),
    Kind('page of classes', *_CLASSES, named=False, mutate=_other_values),
    Kind('page of prompts', *_PROMPTS, named=False, mutate=_other_values),
)
