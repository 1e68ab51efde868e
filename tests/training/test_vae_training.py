"""A small VAE trained on a folder: it learns, its latents have unit size, and its folder can be loaded."""
import os
import re
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.commands import train_vae
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.errors import UserError
from lit_jax.training import vae_training


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('held_out', 5)):
        (tmp_path / 'pictures' / split / 'one').mkdir(parents=True)
        for number in range(count):
            colours = rng.integers(0, 256, (2, 2, 3), np.uint8)          # flat patches: easy to learn
            Image.fromarray(colours).resize((16, 16), Image.Resampling.NEAREST).save(
                tmp_path / 'pictures' / split / 'one' / f'{number}.png')
    config = vae_training.default()
    config.name = 'flat'
    config.data.update({'path': str(tmp_path / 'pictures'), 'image_size': 16})
    config.vae.update({'widths': (8, 8), 'layers': 1, 'groups': 2})
    config.train.update({'steps': 120, 'batch_size': 8, 'window': 8, 'log_every': 30, 'learning_rate': 5e-3})
    return config


@pytest.mark.slow
def test_it_learns_and_writes_a_whole_vae_folder(recipe, tmp_path):
    untrained = VaeNetwork(recipe.vae.to_dict())
    before = vae_training.measure(untrained, jax.jit(untrained.init)(jax.random.key(0)),
                                  vae_training.open_images(recipe, 'held_out'))
    quality = vae_training.train_vae(recipe, tmp_path / 'vae')
    assert quality.psnr > before.psnr + 2 and quality.images == before.images == 5
    vae = load_vae(tmp_path / 'vae')
    assert (vae.id, vae.scale, vae.shift) == ('flat', 1.0, 0.0) and len(vae.sha256) == 64
    mean, _ = vae.encode(vae_training.open_images(recipe, 'train').take(range(12))['image'])
    assert float(np.std(mean)) == pytest.approx(1, rel=1e-3)
    assert vae_training.measure(vae.network, vae.params,
                                vae_training.open_images(recipe, 'held_out')) == quality
    with pytest.raises(UserError, match='exists'):
        vae_training.train_vae(recipe, tmp_path / 'vae')


@pytest.mark.slow
def test_a_folder_without_held_out_images_will_do(recipe, tmp_path, caplog):
    recipe.data.path += '/train'
    recipe.train.steps = 1
    with caplog.at_level('INFO', logger='lit_jax'):
        assert vae_training.train_vae(recipe, tmp_path / 'vae').images == 12
    assert 'on 12 training images' in caplog.text


@pytest.mark.slow
def test_unit_latents_draw_the_same_images(recipe):
    network = VaeNetwork(recipe.vae.to_dict())
    params = jax.jit(network.init)(jax.random.key(1))
    scaled = vae_training.unit_latents(params, 3.0)
    image = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3), minval=-1)
    (mean, logvar), (mean3, logvar3) = network.encode(params, image), network.encode(scaled, image)
    np.testing.assert_allclose(mean3, 3 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logvar3, logvar + 2 * np.log(3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network.decode(scaled, mean3), network.decode(params, mean), atol=1e-4)


@pytest.mark.parametrize('field, value, message', [
    ('train.window', 7, r'train\.window 7 must be a multiple of 2'),
    ('train.window', 32, 'up to data.image_size 16'),
    ('data.image_size', 15, 'image_size 15 is not divisible by 2|window')])
def test_sizes_that_do_not_fit_are_refused(recipe, tmp_path, field, value, message):
    recipe.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        vae_training.train_vae(recipe, tmp_path / 'vae')


def stop_at(step, monkeypatch):
    """Sends SIGTERM to this process while step `step` is logged; one more step may be taken."""
    original = vae_training._log

    def log(number, *args):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(number, *args)

    monkeypatch.setattr(vae_training, '_log', log)


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_and_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch, caplog):
    recipe.train.update({'steps': 8, 'save_every': 3, 'log_every': 1})
    quality = vae_training.train_vae(recipe, tmp_path / 'straight')
    with monkeypatch.context() as patch, caplog.at_level('WARNING', logger='lit_jax'):
        stop_at(5, patch)
        assert vae_training.train_vae(recipe, tmp_path / 'vae') is None
    step, = re.findall(r'saved step (\d) of 8 in \S+vae\.unfinished; run the same command again', caplog.text)
    assert int(step) < 8 and not (tmp_path / 'vae').exists()
    recipe.seed = 1
    with pytest.raises(UserError, match=r'(?s)vae\.unfinished.*seed: 0 there, 1 in this recipe.*delete'):
        vae_training.train_vae(recipe, tmp_path / 'vae')
    recipe.seed, recipe.train.save_every = 0, 100
    with caplog.at_level('INFO', logger='lit_jax'):
        assert vae_training.train_vae(recipe, tmp_path / 'vae') == quality
    assert f'resumed from step {step}' in caplog.text
    one, other = load_vae(tmp_path / 'straight').params, load_vae(tmp_path / 'vae').params
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['pictures', 'straight', 'vae']


@pytest.mark.parametrize('quality, status', [(None, 75), (vae_training.Quality(20.0, 1.0, 5), 0)])
def test_the_command_says_by_its_status_whether_it_is_to_be_started_again(quality, status, monkeypatch):
    monkeypatch.setattr(vae_training, 'train_vae', lambda config, out: quality)
    monkeypatch.setattr('sys.argv', ['train_vae.py', '--config=vae_tiny', '--out=vae'])
    assert train_vae.main() == status


def test_a_loss_that_is_not_finite_is_a_message():
    with pytest.raises(UserError, match='step 3: the loss is nan. Lower train.learning_rate'):
        vae_training._checked(3, {'total': np.nan})
