"""Recipes: every file in configs/ loads, and everything that cannot work is said before anything is
compiled."""
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_networks import network_of
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.models.network import count_parameters
from lit_jax.recipes import recipe
from lit_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
# Recipes of `train.py` that are whole; those of train_vae.py have fields of their own.
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py')
                 if path.stem not in ('vae_tiny', 'baselines', 'student'))
BASELINES = runpy.run_path(str(ROOT / 'configs' / 'baselines.py'))['ROWS']


@pytest.mark.parametrize('name', [*CONFIGS, *(f'baselines:{row}' for row in BASELINES)])
def test_every_recipe_is_whole(name):
    config = recipes.finalize(recipes.load_recipe(name), device_count=8)
    known_as = name.removeprefix('baselines:')
    assert config.name == known_as or config.name.startswith(f'{known_as}_')
    assert config.is_locked
    assert count_parameters(network_of(config)) > 1000


def test_the_lit_recipes_follow_the_paper():
    xl = recipes.load_recipe('lit_xl')
    assert (xl.train.steps, xl.train.batch_size, xl.train.learning_rate) == (1_400_000, 256, 1e-4)
    assert (xl.teacher.lambda_noise, xl.teacher.lambda_variance, xl.train.ema_decay) == (0.5, 0.05, 0.9999)
    large = recipes.load_recipe('lit_xl_512')
    assert (large.train.steps, large.train.batch_size, large.teacher.lambda_noise) == (700_000, 128, 1.0)
    heads = {name: recipes.load_recipe(f'lit_{name}').model.mixer.heads
             for name in recipes.SIZES}
    assert heads == {'s': 2, 'b': 3, 'l': 4, 'xl': 4}


@pytest.mark.parametrize('field, value, message', [
    ('train.batch_size', 12,
     r'12 is not divisible by data · fsdp · accumulate = 8 · 1 · 1 = 8; the nearest that is: 16'),
    ('train.accumulate', 3, 'not divisible'),
    ('data.image_size', 9, r'9 is not divisible by latent\.downscale · model\.patch = 1 · 2 = 2'),
    ('model.mixer.heads', 5, '5 heads do not divide the width 32'),
    ('model.mixer.name', 'fourier', r"unknown mixer 'fourier' \(model.mixer.name\); known: "),
    ('train.dtype', 'float16', "unknown train.dtype 'float16'"),
    ('train.steps', 0, 'train.steps must be a whole number from 1 on, got 0'),
    ('train.label_dropout', 1.0, 'label_dropout'),
    ('train.cooldown_steps', -1, 'cooldown_steps'),
    ('train.cooldown_steps', 10**9, 'cooldown_steps'),
    ('train.remat', 'half', "unknown train.remat 'half'"),
    ('align.loss', 'l3', "unknown align.loss 'l3'.*; known: mse, l1, huber"),
    ('align.optimizer', 'sgd', "unknown align.optimizer 'sgd'.*; known: adamw, came, muon"),
    ('sample.method', 'euler', 'the sampler euler is for models of flow, this one is of ddpm: take ddpm'),
    ('sample.steps', 2000, '2000'),
    ('mesh.tensor', 3, 'multiple of 3 devices, here are 8'),
    ('mesh.data', 4, 'needs 4 devices, here are 8'),
])
def test_what_cannot_work_is_refused(field, value, message):
    config = tiny_recipe()
    section = config
    for part in field.split('.')[:-1]:
        section = section[part]
    section[field.split('.')[-1]] = value
    with pytest.raises(UserError, match=message):
        recipes.finalize(config, device_count=8)


def test_nothing_is_guided_by_a_class_that_is_never_trained():
    config = tiny_recipe(label_dropout=0.0)
    recipes.finalize(config, device_count=8)                     # draws no grids
    config.sample.every = 3
    with pytest.raises(UserError, match=r'null class is never trained, and sample\.cfg_scale guides by it'):
        recipes.finalize(config, device_count=8)
    config.sample.cfg_scale = 1.0
    recipes.finalize(config, device_count=8)
    config.eval.update({'every': 3, 'cfg_scales': (1.0, 1.5)})
    with pytest.raises(UserError, match=r'eval\.cfg_scales guides by it'):
        recipes.finalize(config, device_count=8)


def test_only_data_and_fsdp_may_both_be_free():
    config = tiny_recipe()
    config.mesh.tensor = -1
    with pytest.raises(UserError, match='one may be -1, or data and fsdp together'):
        recipes.finalize(config, device_count=8)


@given(devices=st.integers(1, 512), width=st.sampled_from([32, 384, 1024, 1152]))
def test_free_data_and_fsdp_share_any_number_of_devices(devices, width):
    mesh = recipe._resolve_mesh({'data': -1, 'fsdp': -1, 'tensor': 1, 'seq': 1}, devices, width)
    assert mesh['data'] * mesh['fsdp'] == devices and width % mesh['fsdp'] == 0
    assert mesh['fsdp'] <= recipes.MOST_FSDP
    assert all(width % (mesh['fsdp'] * more) or mesh['fsdp'] * more > recipes.MOST_FSDP
               for more in range(2, 9) if mesh['data'] % more == 0)
    assert all(size['width'] % mesh['fsdp'] == 0 for size in recipes.SIZES.values()
               if devices in (16, 64, 256, 512))


def test_the_free_mesh_axis_takes_the_devices_that_are_left():
    config = tiny_recipe()
    config.mesh.fsdp = 4
    assert recipes.finalize(config, device_count=8).mesh.data == 2


@pytest.mark.parametrize('mesh, message', [
    ({'tensor': 4}, r'its 2 softmax heads are not divisible by mesh\.tensor = 4; mesh\.tensor can be 1, 2'),
    ({'seq': 8}, r'its 4 rows of tokens are not divisible by mesh\.seq = 8; mesh\.seq can be 1, 2, 4'),
    ({'data': 1, 'fsdp': 24}, r'its 32 channels are not divisible by mesh\.fsdp = 24'),
])
def test_a_model_that_the_mesh_cannot_cut_is_refused(mesh, message):
    config = tiny_recipe(batch_size=48)
    config.mesh.update(mesh)
    with pytest.raises(UserError, match=message):
        recipes.finalize(config, device_count=24 if 'fsdp' in mesh else 8)


def test_a_recipe_cannot_grow_fields():
    with pytest.raises(AttributeError, match='batchsize'):
        tiny_recipe().train.batchsize = 3


def test_finalize_leaves_its_argument_alone():
    config = tiny_recipe()
    recipes.finalize(config, device_count=8)
    assert config.mesh.data == -1
