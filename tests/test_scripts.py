"""The command line as a person meets it: right commands, wrong commands, one clear message each."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_recipe

from lit_jax.errors import UserError
from lit_jax.sampling import draw_grid, parse_classes
from lit_jax.training import loop

ROOT = Path(__file__).parents[1]


def call(*arguments, **env):
    """(exit status, stdout, stderr) of a script in its own process, on one CPU device."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', **env})
    return done.returncode, done.stdout, done.stderr


def test_dry_run_prints_recipe_parameters_cost_and_what_is_missing(tmp_path):
    status, out, _ = call('train.py', '--config=configs/lit_xl.py', '--dry_run', LIT_JAX_DATA=str(tmp_path))
    assert status == 0
    for part in ('"learning_rate": 0.0001', '675,242,528 parameters', 'blocks/attn/kv/kernel', 'GMACs', 'models/dit_xl',
                 'convert_torch_ckpt.py', 'prepare_latents.py'):
        assert part in out, part


@pytest.mark.parametrize('arguments, message', [
    (['--config=configs/digits_dit.py', '--config.train.batchsize=3'], 'batchsize'),
    (['--config=configs/digits_dit.py', '--config.train.batch_size=many'], 'many'),
    (['--config=configs/no_such.py'], 'no_such'),
    (['--config=configs/digits_dit.py', 'stray'], 'stray'),
    ([], 'no recipe given'),
    (['--config=configs/digits_dit.py', '--config.data.image_size=9'], 'not divisible'),
    (['--config=configs/lit_xl.py'], 'prepare_latents.py'),
])
def test_a_wrong_command_gets_one_message_and_writes_nothing(arguments, message, tmp_path):
    status, _, errors = call('train.py', *arguments, f'--workdir={tmp_path / "run"}', LIT_JAX_DATA=str(tmp_path / 'data'))
    assert status == 1
    assert errors.startswith('error: ') and message in errors and 'Traceback' not in errors
    assert not (tmp_path / 'run').exists()


def test_importing_the_package_is_light():
    """No jax, no torch, no tensorflow before something is asked for."""
    status, out, _ = call('-c', 'import sys, lit_jax; print(sorted({"jax", "torch", "tensorflow", "flax"} & set(sys.modules)))')
    assert (status, out.strip()) == (0, '[]')


def test_loading_does_not_import_torch_or_tensorflow(tmp_path):
    loop.train(tiny_recipe(steps=1), tmp_path)
    code = (f'import sys, lit_jax; lit_jax.load({str(tmp_path)!r}); '
            'print(sorted({"torch", "tensorflow", "diffusers"} & set(sys.modules)))')
    status, out, errors = call('-c', code)
    assert (status, out.strip()) == (0, '[]'), errors


def test_sampling_draws_one_row_a_class_and_the_same_for_the_same_seed(tmp_path):
    loop.train(tiny_recipe(steps=1), tmp_path / 'run')
    options = {'classes': '3,7', 'per_class': 4, 'cfg_scale': 2.0, 'cfg_channels': '3', 'steps': 4, 'method': 'ddim',
               'eta': 0.0, 'dtype': 'float32'}
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        draw_grid(tmp_path / 'run', tmp_path / f'{name}.png', seed=seed, **options)
    pictures = [np.asarray(Image.open(tmp_path / f'{name}.png')) for name in 'abc']
    assert pictures[0].shape[1] > 1.5 * pictures[0].shape[0]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize('change, message', [
    ({'classes': '10'}, r'class 10 is out of range; this model knows 0\.\.9'), ({'classes': 'cat'}, 'not a list of class'),
    ({'steps': 2000}, '2000'), ({'method': 'euler'}, 'known: ddpm, ddim'), ({'per_class': 0}, 'per_class'),
    ({'dtype': 'int8'}, 'unknown dtype'), ({'source': 'nowhere'}, 'nowhere does not exist')])
def test_a_wrong_request_for_samples_is_refused(change, message, tmp_path):
    loop.train(tiny_recipe(steps=1), tmp_path / 'run')
    options = {'source': tmp_path / 'run', 'classes': '3', 'per_class': 1, 'cfg_scale': 1.0, 'cfg_channels': '3',
               'steps': 4, 'method': 'ddpm', 'eta': 0.0, 'seed': 0, 'dtype': 'float32', **change}
    with pytest.raises(UserError, match=message):
        draw_grid(options.pop('source'), tmp_path / 'grid.png', **options)
    assert not (tmp_path / 'grid.png').exists()


def test_classes_default_to_the_first_ten():
    assert parse_classes('', 1000) == list(range(10))
    assert parse_classes('', 3) == [0, 1, 2]
