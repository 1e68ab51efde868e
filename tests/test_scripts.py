"""The command line as a person meets it: right commands, wrong commands, one clear message each."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_jax.report.grids import GAP, LETTER
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.draw import draw
from lit_jax.sampling.request import SampleRequest

pytestmark = pytest.mark.usefixtures('two_devices')

ROOT = Path(__file__).parents[1]


def call(*arguments, **env):
    """(exit status, stdout, stderr) of a script in its own process, on one CPU device."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', **env})
    return done.returncode, done.stdout, done.stderr


def test_dry_run_prints_recipe_parameters_cost_and_what_is_missing(tmp_path):
    status, out, _ = call('train.py', '--config=configs/lit_xl.py', '--dry_run', '--verbose',
                          LIT_JAX_DATA=str(tmp_path))
    assert status == 1      # its data and its teacher are missing
    for part in ('"learning_rate": 0.0001', '675,242,528 parameters', 'blocks/attn/kv/kernel', 'GMACs',
                 'models/dit_xl', 'convert_torch_ckpt.py', 'prepare_latents.py'):
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
    status, _, errors = call('train.py', *arguments, f'--workdir={tmp_path / "run"}',
                             LIT_JAX_DATA=str(tmp_path / 'data'))
    assert status == 1
    said = [line for line in errors.splitlines() if 'starting: ' not in line]      # the only other line
    assert said[0].startswith('error: ') and message in errors and 'Traceback' not in errors
    assert not (tmp_path / 'run').exists()


def test_help_and_typing_mistakes_are_answered_before_jax_is_imported():
    """Of every command; the help of train.py tells of the recipe as well."""
    code = """
import importlib, pkgutil, sys, lit_jax.commands
for module in pkgutil.iter_modules(lit_jax.commands.__path__):
    main = getattr(importlib.import_module(f'lit_jax.commands.{module.name}'), 'main', None)
    for flag, status in (('--help', 0), ('--dtipe', 2)) if main else ():
        sys.argv = [module.name, flag]
        try:
            main()
        except SystemExit as end:
            print(module.name, flag, (end.code or 0) == status)
print(sorted({'jax', 'flax', 'torch'} & set(sys.modules)))
"""
    status, out, errors = call('-c', code)
    assert status == 0 and out.endswith('[]\n') and 'False' not in out, out + errors
    for line in ('usage: train --config=FILE [options]', '--workdir WORKDIR', '--config.FIELD=VALUE',
                 'digits_dit', 'paper/table1', 'analyze --dtipe True'):
        assert line in out
    assert 'unknown flag --dtipe; did you mean --dtype?' in errors


def test_importing_the_package_is_light():
    """No jax, no torch, no tensorflow before something is asked for."""
    status, out, _ = call('-c', 'import sys, lit_jax; print(sorted({"jax", "torch", "tensorflow", "flax"} & '
                                'set(sys.modules)))')
    assert (status, out.strip()) == (0, '[]')


def test_loading_does_not_import_torch_or_tensorflow(workdir):
    code = (f'import sys, lit_jax; lit_jax.load({str(workdir)!r}); '
            'print(sorted({"torch", "tensorflow", "diffusers"} & set(sys.modules)))')
    status, out, errors = call('-c', code)
    assert (status, out.strip()) == (0, '[]'), errors


@pytest.fixture
def workdir(one_step):
    return one_step


def test_sampling_draws_one_row_a_class_and_the_same_for_the_same_seed(workdir, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        draw(SampleRequest(out=str(tmp_path / f'{name}.png'), source=str(workdir), classes='3,7', per_class=4,
                           cfg_scale=2.0, steps=4, method='ddim', seed=seed))
    images = [np.asarray(Image.open(tmp_path / f'{name}.png')) for name in 'abc']
    assert images[0].shape[1] > 1.5 * images[0].shape[0]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()


def test_two_models_are_drawn_side_by_side_from_the_same_noise(workdir, tmp_path):
    """Compared with itself, a model draws the same image twice, each half under its own name."""
    options = {'classes': '1,2', 'per_class': 3, 'steps': 3, 'method': 'dpm++'}
    line = draw(SampleRequest(out=str(tmp_path / 'pair.png'), compare=(str(workdir),) * 2, **options))
    draw(SampleRequest(out=str(tmp_path / 'one.png'), source=str(workdir), **options))
    pair, one = (np.asarray(Image.open(tmp_path / f'{name}.png')) for name in ('pair', 'one'))
    title, pad = LETTER + 8, 4
    assert '12 images' in line and pair.shape[0] == one.shape[0] + title
    left = pair[title:, :one.shape[1]]
    np.testing.assert_array_equal(left, one)
    grid, names = 3 * (32 + pad) + pad, one.shape[1] - 3 * (32 + pad) - pad
    second = names + (pair.shape[1] - names + GAP) // 2     # the titles, paths, are wider than the grids
    np.testing.assert_array_equal(pair[title:, second:second + grid], one[:, names:])
    assert (pair[:title, names:second] < 128).any() and (pair[:title, second:] < 128).any()


@pytest.mark.parametrize('change, message', [
    ({'classes': '10'}, r'class 10 is out of range; this model knows 0\.\.9'),
    ({'classes': 'cat'}, "unknown class 'cat'"), ({'steps': 2000}, '2000'),
    ({'method': 'euler'}, r'take ddpm, ddim, dpm\+\+'), ({'per_class': 0}, 'per_class'),
    ({'dtype': 'int8'}, 'unknown dtype'), ({'source': 'nowhere'}, 'nowhere does not exist'),
    ({'eta': 0.1}, 'eta 0.1 belongs'), ({'count': 5}, '--count and --labels are for sets'),
    ({'cfg_interval': (0.4, 0.4)}, 'guidance interval'),
    ({'vae': 'models/sd_vae'}, 'leave --vae models/sd_vae out')])
def test_a_wrong_request_for_samples_is_refused(change, message, workdir, tmp_path):
    options = {'source': str(workdir), 'classes': '3', 'per_class': 1, 'cfg_scale': 1.0, 'steps': 4, **change}
    with pytest.raises(UserError, match=message):
        draw(SampleRequest(out=str(tmp_path / 'grid.png'), **options))
    assert not (tmp_path / 'grid.png').exists()


def test_sample_py_draws_a_grid_and_names_what_is_wrong(workdir, tmp_path):
    arguments = ['--from', str(workdir), '--classes', '3,7', '--per_class', '2', '--cfg_scale', '4',
                 '--steps', '3']
    status, out, errors = call('sample.py', *arguments, '--out', str(tmp_path / 'grid.png'))
    assert status == 0 and out.startswith(f'wrote {tmp_path / "grid.png"}: 4 images of 8x8, ddpm'), errors
    status, _, errors = call('sample.py', *arguments, '--method', 'euler', '--out',
                             str(tmp_path / 'other.png'))
    assert status == 1 and 'is for models of flow' in errors and 'Traceback' not in errors
    assert os.listdir(tmp_path) == ['grid.png']
