"""Training on cached latents, and from images with the VAE in the step."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_sets import write_latents, write_tiny_vae
from tiny import tiny_recipe

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop, setup
from lit_jax.training.step import clean_inputs
from lit_jax.training.telemetry import read_lines

KEY = jax.random.key(3)


@pytest.fixture
def folders(tmp_path):
    """Four classes of coloured 8x8 images, and a VAE that halves their sides."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / 'pictures' / f'class{label}').mkdir(parents=True)
        for number in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3),
                                         np.uint8)).save(tmp_path / 'pictures' / f'class{label}'
                                                         / f'{number}.png')
    write_tiny_vae(tmp_path / 'vae', scale=4.0)
    return tmp_path


def recipe(name, path, *, folder='', **latent):
    config = tiny_recipe(steps=4)
    config.data.update({'name': name, 'path': str(path), 'image_size': 8, 'num_classes': 4, 'flip': True})
    config.latent.update({'space': 'vae', 'vae': 'tiny-0', 'downscale': 2, 'channels': 3, 'scale': 4.0,
                          'vae_path': str(folder), **latent})
    return config


def test_the_posterior_is_sampled_anew_in_every_step():
    """x0 = scale · (mean + exp(logvar / 2) · noise): mean and spread of the draws are those of the
    moments."""
    mean, std = jnp.full((4096, 2, 2, 1), 0.7), 0.2
    batch = {'moments': jnp.concatenate([mean, jnp.full_like(mean, 2 * np.log(std))], axis=-1)}
    objective = setup.build_objective(recipe('latents', 'nowhere'))
    draws = [clean_inputs(batch, jax.random.fold_in(KEY, step), objective) for step in range(2)]
    assert draws[0].shape == mean.shape and not np.array_equal(*draws)
    for x0 in draws:      # 16,384 numbers: the mean is known to 0.8 / 128, five times of which is the bound
        assert abs(float(x0.mean()) - 4 * 0.7) < 5 * 0.8 / 128 and abs(float(x0.std()) / (4 * std) - 1) < 0.03


def test_images_in_the_step_give_what_their_cached_moments_give(folders):
    vae = load_vae(folders / 'vae')
    config = recipe('folder', folders / 'pictures', folder=folders / 'vae')
    images = setup.build_source(config).take(range(5))['image']
    mean, logvar = vae.encode(images)
    cached = clean_inputs({'moments': jnp.concatenate([mean, logvar], -1)}, KEY,
                          setup.build_objective(config))
    direct = clean_inputs({'image': images}, KEY, setup.build_objective(config),
                          lambda image: vae.network.encode(vae.params, image))
    np.testing.assert_allclose(direct, cached, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_images_with_the_vae_in_the_step_draws_images(folders):
    config = recipe('folder', folders / 'pictures', folder=folders / 'vae')
    config.sample.update({'every': 4, 'count': 4, 'steps': 2})
    assert loop.train(config, folders / 'run') == 'done'
    assert np.isfinite(read_lines(folders / 'run' / 'metrics.jsonl')[-1]['loss/mse'])
    from PIL import Image
    grid = np.asarray(Image.open(folders / 'run' / 'samples' / '000000004.png'))
    assert grid.ndim == 3 and grid.shape[2] == 3


@pytest.mark.slow
def test_a_run_on_cached_latents(tmp_path):
    write_latents(tmp_path / 'latents', classes=4, scale=4.0)
    config = recipe('latents', tmp_path / 'latents')
    config.latent.vae = 'made-up'
    assert loop.train(config, tmp_path / 'run') == 'done'
    assert read_lines(tmp_path / 'run' / 'metrics.jsonl')[-1]['step'] == 4


@pytest.mark.parametrize('change, message', [
    ({'latent.vae': 'another'}, "vae: 'made-up' in the latents, 'another' in the recipe"),
    ({'latent.scale': 0.5}, r'scale: 4\.0 in the latents, 0\.5 in the recipe'),
    ({'data.num_classes': 5}, 'num_classes: 4 in the data set, 5 in the recipe'),
    ({'data.image_size': 16}, 'image_size: 4 in the data set, 8 in the recipe'),
])
def test_latents_that_were_made_otherwise_are_refused_before_anything_is_written(tmp_path, change, message):
    write_latents(tmp_path / 'latents', classes=4, scale=4.0)
    config = recipe('latents', tmp_path / 'latents')
    config.latent.vae = 'made-up'
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_latents_of_another_vae_than_the_one_given_are_refused(tmp_path):
    write_latents(tmp_path / 'latents', classes=4, scale=4.0)
    write_tiny_vae(tmp_path / 'vae', scale=4.0)
    config = recipe('latents', tmp_path / 'latents', folder=tmp_path / 'vae')
    config.latent.vae = 'made-up'
    with pytest.raises(UserError, match='sha256: .* in the latents, .* in the VAE .*vae'):
        loop.train(config, tmp_path / 'run')


@pytest.mark.parametrize('latent, message', [
    ({'scale': 1.0}, r'scale: 4\.0 in the VAE, 1\.0 in the recipe'),
    ({'vae': 'sd'}, "vae: 'tiny-0' in the VAE, 'sd' in the recipe"),
])
def test_a_vae_that_does_not_fit_the_recipe_is_refused(folders, latent, message):
    config = recipe('folder', folders / 'pictures', folder=folders / 'vae', **latent)
    with pytest.raises(UserError, match=message):
        loop.train(config, folders / 'run')
    assert not (folders / 'run').exists()


def test_images_without_a_vae_say_how_to_get_one(folders):
    with pytest.raises(UserError,
                       match=r'latent\.vae_path: to train from the images of folder.*prepare_latents\.py'):
        loop.train(recipe('folder', folders / 'pictures'), folders / 'run')


@pytest.mark.slow
def test_a_damaged_image_is_replaced_and_reported(folders, caplog):
    (folders / 'pictures' / 'class1' / '3.png').write_bytes(b'')
    config = recipe('folder', folders / 'pictures', folder=folders / 'vae')
    assert loop.train(config, folders / 'run') == 'done'
    assert any('1 damaged image(s) were replaced' in record.getMessage() for record in caplog.records)
    config.data.strict = True
    with pytest.raises(UserError, match='3.png cannot be decoded: it is empty'):
        loop.train(config, folders / 'strict')
