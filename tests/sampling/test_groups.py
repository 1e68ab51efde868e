"""An image's bits: the same alone, in any batch, on any number of devices; another group size rounds
differently."""
import jax
import numpy as np
import pytest
from sampling_models import save_latent_model, save_model, save_vae

import lit_jax
from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.sampling.groups import GroupSampler, Images
from lit_jax.sampling.noise import initial_noise, random_labels, step_keys
from lit_jax.sampling.program import build_sampler

SETTINGS = SamplerSettings(steps=6, cfg_scale=2.0)


@pytest.fixture(scope='module', params=['softmax', 'linear'])
def model(request, tmp_path_factory):
    return lit_jax.load(save_model(tmp_path_factory.mktemp('models') / request.param, mixer=request.param))


def sampler(model, count=50, devices=1, group=8, seed=3, settings=SETTINGS, **options):
    labels = random_labels(seed, count, range(10))
    return GroupSampler(model, settings, Images.of_classes(labels, seed), group=group,
                        devices=jax.devices()[:devices], **options)


def draw_all(sampler):
    return np.concatenate([images for _, images in sampler.draw(range(sampler.count))])


@pytest.fixture(scope='module')
def reference(model):
    return draw_all(sampler(model))


@pytest.mark.parametrize('devices', [2, 8])
def test_the_number_of_devices_does_not_change_a_bit(model, reference, devices):
    assert reference.shape == (50, 8, 8, 1) and reference.std() > 0.1
    np.testing.assert_array_equal(draw_all(sampler(model, devices=devices)), reference)


@pytest.mark.parametrize('batch_size', [1, 7, 64])
def test_the_batch_does_not_change_a_bit(model, reference, batch_size):
    got = dict(sampler(model, devices=2).draw(range(7), batch_size))
    np.testing.assert_array_equal(np.concatenate([got[k] for k in range(7)]), reference)


def test_any_groups_in_any_order_and_a_smaller_set(model, reference):
    got = dict(sampler(model, devices=2).draw([6, 1, 4]))
    assert sorted(got) == [1, 4, 6] and len(got[6]) == 2
    for group, images in got.items():
        np.testing.assert_array_equal(images, reference[8 * group:8 * group + 8])
    np.testing.assert_array_equal(draw_all(sampler(model, count=20)), reference[:20])


def test_another_group_size_rounds_differently_and_no_more(model, reference):
    other = draw_all(sampler(model, group=5))
    np.testing.assert_allclose(other, reference, atol=1e-4 * np.abs(reference).max())
    sample = jax.jit(build_sampler(model.network, SETTINGS, model.config),
                     compiler_options=model.network.inference_options())
    labels = random_labels(3, 50, range(10))
    for numbers in (np.arange(7), np.arange(43, 50), np.arange(50)):
        batch = sample(model.params, initial_noise(model.network, 3, numbers), {'label': labels[numbers]},
                       step_keys(3, numbers))
        np.testing.assert_allclose(batch, reference[numbers], atol=1e-4 * np.abs(reference).max())


def test_seed_number_and_label_make_the_image(model, reference):
    assert not np.allclose(draw_all(sampler(model, seed=4))[0], reference[0])
    assert not np.allclose(initial_noise(model.network, 0, [0]), initial_noise(model.network, 0, [1]))
    labels = (random_labels(3, 50, range(10)) + 1) % 10
    other = draw_all(GroupSampler(model, SETTINGS, Images.of_classes(labels, 3), group=8,
                                  devices=jax.devices()[:1]))
    assert not np.allclose(other[0], reference[0])


def test_step_noise_has_keys_apart_from_the_initial_noise():
    keys = jax.random.key_data(step_keys(0, range(4)))
    initial = jax.random.key_data(jax.vmap(jax.random.fold_in,
                                           (None, 0))(jax.random.key(0), np.arange(4, dtype=np.uint32)))
    assert len(np.unique(np.concatenate([keys, initial]), axis=0)) == 8


@pytest.mark.slow
def test_latents_are_decoded_by_the_vae_in_the_same_program(tmp_path):
    model = lit_jax.load(save_latent_model(tmp_path / 'model'))
    vae = load_vae(save_vae(tmp_path / 'vae'))
    latents = draw_all(sampler(model, count=10, group=4))
    images = draw_all(sampler(model, count=10, group=4, devices=2, vae=vae))
    assert images.shape == (10, 16, 16, 3)
    np.testing.assert_allclose(images, vae.decode(latents), atol=1e-4 * np.abs(images).max())


def test_options_that_contradict_each_other_are_refused(model):
    for options, message in (({'eta': 0.5}, 'eta 0.5 belongs to ddim'),
                             ({'method': 'ddim', 'eta': 2.0}, 'between 0'),
                             ({'method': 'dpm++', 'eta': 0.5}, 'belongs to ddim'),
                             ({'cfg_scale': 2.0, 'cfg_interval': (0.8, 0.2)}, 'guidance interval')):
        with pytest.raises(lit_jax.UserError, match=message):
            build_sampler(model.network, SamplerSettings(**options), model.config)


@pytest.mark.parametrize('method, guidance', [('dopri5', 2.0), *(
    pytest.param(method, guidance, marks=pytest.mark.slow)
    for method in ('sde', 'sde_heun', 'heun', 'dpm++') for guidance in (2.0, 1.0))])
def test_flows_are_drawn_bit_for_bit_alike_too(method, guidance, tmp_path):
    """Even where each image has steps of its own: neighbours and devices change nothing."""
    flow = lit_jax.load(save_model(tmp_path / 'flow', diffusion=Flow().to_json()))
    settings = SamplerSettings(method, 6, cfg_scale=guidance, cfg_interval=(0.0, 0.7 if guidance > 1 else 1))
    alone = draw_all(sampler(flow, count=12, settings=settings))
    assert np.isfinite(alone).all() and alone.std() > 0
    got = dict(sampler(flow, count=12, settings=settings, devices=2).draw(range(2), 7))
    np.testing.assert_array_equal(np.concatenate([got[0], got[1]]), alone)
    with pytest.raises(lit_jax.UserError, match='a flow has times t from 0 to 1, got t from 500'):
        flow(np.zeros((1, 8, 8, 1)), 500, 3)
