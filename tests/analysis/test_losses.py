"""Loss by timestep, against the terms of training computed one image at a time."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_sets import moments_of, write_latents
from PIL import Image
from sampling_models import save_latent_model, save_model, save_vae

import lit_jax
from lit_jax.analysis.examples import data_recipe, open_images
from lit_jax.analysis.losses import loss_by_time
from lit_jax.data.sources import open_source
from lit_jax.diffusion.distillation import distillation_losses
from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.objective import q_sample, training_losses
from lit_jax.runtime.errors import UserError

TERMS = ('mse', 'vb')


class Counter:
    def __init__(self):
        self.done = 0

    def add(self, count):
        self.done += count


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('analysed')
    latent = {'space': 'pixels', 'vae': None, 'scale': 2.0}
    return {'student': lit_jax.load(save_model(folder / 'student', mixer='linear', latent=latent)),
            'teacher': lit_jax.load(save_model(folder / 'teacher', seed=1, latent=latent))}


@pytest.fixture(scope='module')
def images(models):
    return open_images(models['student'], data_recipe(models['student'], 'student'), 5)


def test_images_are_spread_over_the_source_and_scaled(images, models):
    source = open_source('digits')
    assert images.numbers.tolist() == [0, 359, 718, 1077, 1436]
    for i, number in enumerate(images.numbers):
        np.testing.assert_allclose(images.x0[i], source[int(number)]['image'] * 2)
        assert images.label[i] == source[int(number)]['label']
    # an image keeps its noise
    other = open_images(models['teacher'], data_recipe(models['teacher'], 'teacher'), 3)
    np.testing.assert_array_equal(other.noise[1], images.noise[2])
    assert images.visible().dtype == np.uint8 and images[[3, 1]].numbers.tolist() == [1077, 359]


def test_the_loss_is_that_of_training(models, images):
    """Every mean and standard error, from `training_losses` and `distillation_losses` of single images."""
    timesteps, counter = [0, 400, 999], Counter()

    @jax.jit
    def terms(outputs, x0, x_t, at, noise):
        return [training_losses(images.diffusion.table, output, x0, x_t, at, noise) for output in outputs], \
            distillation_losses(*outputs)

    found = loss_by_time(models, images, timesteps, 2, counter)
    assert counter.done == 15
    for row, t in enumerate(timesteps):
        single = {name: [] for name in (*models, 'difference')}
        for i in range(5):
            x0, noise, at = (jnp.asarray(a) for a in (images.x0[i:i + 1], images.noise[i:i + 1], [t]))
            x_t = jax.jit(q_sample, static_argnums=0)(images.diffusion.table, x0, at, noise)
            outputs = [model(x_t, at, images.label[i:i + 1]) for model in models.values()]
            losses, difference = terms(outputs, x0, x_t, at, noise)
            for name, one in zip((*models, 'difference'), (*losses, difference), strict=True):
                single[name].append(one)
        for name, parts in single.items():
            for term, values in found[name].items():
                want = np.array([part[term][0] for part in parts])
                np.testing.assert_allclose(values['mean'][row], want.mean(), rtol=1e-4)
                np.testing.assert_allclose(values['error'][row], want.std(ddof=1) / np.sqrt(5), rtol=1e-3,
                                           atol=1e-7)
        for term in TERMS:
            mine, theirs = (np.array([part[term][0] for part in single[name]], np.float64) for name in models)
            np.testing.assert_allclose(found['ratio'][term]['mean'][row], mine.mean() / theirs.mean(),
                                       rtol=1e-4)
            np.testing.assert_allclose(found['ratio'][term]['error'][row],
                                       (mine - theirs).std(ddof=1) / np.sqrt(5) / theirs.mean(), rtol=1e-3,
                                       atol=1e-6)


@pytest.mark.parametrize('flow', [Flow(), Flow('cosine', 'noise', 1, 'likelihood')])
def test_the_loss_of_a_flow_is_that_of_training_at_its_own_times(flow, models, images):
    """From its first time to its last; a student that is its teacher differs nowhere."""
    times = flow.spread_times(3)
    low, high = sorted(flow.model_time(t) for t in flow.interval())
    np.testing.assert_allclose(times, [low, (low + high) / 2, high])
    own = dataclasses.replace(images, diffusion=flow)
    model, term = models['student'], f'distill_{flow.prediction}'
    found = loss_by_time({'student': model, 'teacher': model}, own, times, 3, Counter())
    assert {*found['student']} == {*found['ratio']} == {'mse'} and {*found['difference']} == {term}
    assert found['difference'][term]['mean'] == [0.0] * 3
    t_B = np.full(5, times[1], np.float32)
    x_t = own.noised(times[1])
    np.testing.assert_allclose(x_t, flow.add_noise(images.x0, t_B, images.noise), rtol=1e-5, atol=1e-6)
    want = flow.losses(model(x_t, t_B, images.label), images.x0, x_t, jnp.asarray(t_B), images.noise)
    np.testing.assert_allclose(found['student']['mse']['mean'][1], want['mse'].mean(), rtol=1e-4)


def test_a_model_beside_itself_differs_nowhere(models, images):
    found = loss_by_time({'student': models['student'], 'teacher': models['student']}, images, [500], 8,
                             Counter())
    assert found['ratio']['mse'] == {'mean': [1.0], 'error': [0.0]}
    assert found['difference']['distill_noise']['mean'] == [0.0]


def test_one_model_has_no_ratio_and_one_image_no_error(models, images):
    found = loss_by_time({'model': models['student']}, images[:1], [500], 8, Counter())
    assert set(found) == {'model'} and np.isnan(found['model']['mse']['error']).all()


def test_latents_are_sampled_once_from_their_posterior(tmp_path):
    """mean + exp(logvar / 2)·noise of the image, not of its mirror image, times the scale."""
    write_latents(tmp_path / 'latents', 6)
    model = lit_jax.load(save_model(tmp_path / 'model',
                                    latent={'space': 'vae', 'vae': 'made-up', 'scale': 0.5, 'downscale': 2},
                                    input_size=(4, 4), channels=3, num_classes=5, classes=False))
    recipe = data_recipe(model, 'model', 'latents', str(tmp_path / 'latents'))
    images = open_images(model, recipe, 3)
    for i, number in enumerate(images.numbers):
        mean, logvar = np.split(moments_of(int(number))[0], 2, axis=-1)
        deviation = (images.x0[i] / 0.5 - mean) / np.exp(logvar / 2)
        assert 0.3 < deviation.std() < 2 and abs(deviation.mean()) < 1
    np.testing.assert_array_equal(open_images(model, recipe, 3).x0, images.x0)
    save_model(tmp_path / 'other', latent={'space': 'vae', 'vae': 'another', 'scale': 0.5, 'downscale': 2},
               input_size=(4, 4), channels=3, num_classes=5, classes=False)
    other = lit_jax.load(tmp_path / 'other')
    with pytest.raises(UserError, match="vae: 'made-up' in the latents, 'another' in the recipe"):
        open_images(other, data_recipe(other, 'other', 'latents', str(tmp_path / 'latents')), 3)


@pytest.mark.slow
def test_images_are_encoded_by_the_vae_that_is_given(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        folder = tmp_path / 'pictures' / 'train' / f'class{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f'{i}.png')
    save_latent_model(tmp_path / 'model', num_classes=2, classes=False)
    save_vae(tmp_path / 'vae')
    model = lit_jax.load(tmp_path / 'model')
    with pytest.raises(UserError, match='give the VAE: --vae=FOLDER'):
        data_recipe(model, 'model', 'folder', str(tmp_path / 'pictures'))
    recipe = data_recipe(model, 'model', 'folder', str(tmp_path / 'pictures'), str(tmp_path / 'vae'))
    images = open_images(model, recipe, 4)
    assert images.x0.shape == (4, 8, 8, 4) and np.isfinite(images.x0).all()
    assert images.visible().shape == (4, 8, 8, 3)


@pytest.mark.parametrize('arch, arguments, message', [
    ({'input_size': (4, 4), 'num_classes': 3, 'classes': False}, (), 'does not record its data set'),
    ({'input_size': (4, 8)}, ('digits',), '4 x 8'), ({}, ('imagenet',), 'unknown --data=imagenet'),
    ({'num_classes': 3, 'classes': False}, ('digits',), 'digits has num_classes 10'),
    ({'channels': 4}, ('latents', '/nowhere'), 'does not exist')])
def test_data_that_cannot_be_is_refused(arch, arguments, message, tmp_path):
    model = lit_jax.load(save_model(tmp_path / 'model', **arch))
    with pytest.raises(UserError, match=message):
        open_images(model, data_recipe(model, 'the model', *arguments), 2)


def test_the_recipe_of_an_older_run_takes_todays_fields(models):
    config = json.loads(json.dumps({**models['student'].config, 'recipe': {
        'model': {}, 'data': {'name': 'synthetic', 'path': ''}, 'seed': 3, 'teacher': {'path': 'there'}}}))
    recipe = data_recipe(type('Old', (), {'config': config}), 'old')
    assert (recipe.data.name, recipe.data.strict, recipe.seed,
            recipe.teacher.path) == ('synthetic', False, 3, 'there')


def test_the_ratio_is_student_over_teacher_whatever_their_names(models, images):
    """Dicts come back from jit sorted by name; the ratio is still student over teacher."""
    swapped = {'zebra': models['student'], 'ant': models['teacher']}
    found, named = (loss_by_time(m, images, [100], 8, Counter()) for m in (swapped, models))
    np.testing.assert_allclose(found['ratio']['mse']['mean'], named['ratio']['mse']['mean'], rtol=1e-6)
    assert jax.tree.structure(found['ratio']) == jax.tree.structure(named['ratio'])
