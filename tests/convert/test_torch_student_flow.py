"""Flows in PyTorch: samplers, guidance and folders of exports draw as lit_jax does."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from student_archs import ARCHS, FLOW, saved, weights

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert
from lit_jax.convert.torch_student import modeling_source
from lit_jax.diffusion.flow_samplers import FORMS, LAST_STEPS
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.diffusion.settings import FLOW_METHODS, SamplerSettings
from lit_jax.models.network import Network
from lit_jax.runtime.leaves import named_leaves
from lit_jax.sampling.program import build_sampler

NOISES = {**FLOW, 'path': 'vp', 'prediction': 'noise', 'noise_at': 1}
SETTINGS = {
    'euler': (FLOW, {'method': 'euler', 'shift': 3.0, 'cfg_interval': (0.2, 0.7)}),
    'heun to noise': ({**FLOW, 'noise_at': 1}, {'method': 'heun', 'cfg_interval': (0.2, 0.7)}),
    'heun2': ({**FLOW, 'path': 'gvp', 'prediction': 'score'}, {'method': 'heun2', 'cfg_channels': 'all'}),
    'dpm++': ({**FLOW, 'prediction': 'clean'}, {'method': 'dpm++', 'shift': 2.0}),
    'sde': (FLOW, {'method': 'sde'}),
    'sde of noise': (NOISES, {'method': 'sde', 'sde_form': 'linear', 'last_step': 'tweedie'}),
    'sde without a last step': ({**FLOW, 'path': 'gvp'}, {'method': 'sde', 'last_step': 'none',
                                                          'sde_form': 'decreasing'}),
    'sde_heun': ({**FLOW, 'noise_at': 1}, {'method': 'sde_heun', 'last_step': 'euler', 'last_size': 0.1}),
    'dopri5': (NOISES, {'method': 'dopri5', 'steps': 20})}


def module_of(text):
    module = type(sys)('modeling_lit')
    exec(compile(text, 'modeling_lit.py', 'exec'), module.__dict__)
    return module


def to_torch(torch, array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


@pytest.mark.peers
@pytest.mark.parametrize('name', SETTINGS)
def test_trajectories_are_those_of_lit_jax(name):
    """A model of one line, which every sampler and guidance sees alike; float64."""
    torch = pytest.importorskip('torch')
    module = module_of(modeling_source(ARCHS['lit'], flow=True))
    section, told = SETTINGS[name]
    settings, flow = SamplerSettings(**{'steps': 6, 'cfg_scale': 1.5, **told}), read_diffusion(section)
    settings.check(section)
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 2, 2, 4)), rng.standard_normal((6, 2, 2, 2, 4))
    label = np.array([1.0, 3.0])

    def model(library, x, t, label):
        t, label = (a.reshape(-1, 1, 1, 1) for a in (t, label))
        return library.sin(x * (1.5 + t) + label)

    states, random = [], settings.method.startswith('sde')
    options = {name: getattr(settings, name) for name in (*module.OPTIONS, 'tolerance')}
    interval = module.guided_times(section, *settings.cfg_interval)
    predict = module.guided(lambda *inputs: model(torch, *inputs), (torch.from_numpy(label),),
                            (torch.full((2,), 5.0),), 1.5, settings.cfg_channels, interval)
    last = module.sample(predict, to_torch(torch, x), settings.method, settings.steps, section,
                         noise=to_torch(torch, noise), callback=lambda x: states.append(x.movedim(1, -1)),
                         **options)
    with jax.enable_x64(True):
        apply = guide(lambda x, t, cond: model(jnp, x, t, cond['label']), 1.5,
                      lambda cond: (cond, {'label': jnp.full(2, 5.0)}), settings.cfg_channels,
                      flow.guided_times(settings.cfg_interval), one_time=settings.method != 'dopri5')
        run = flow.sampler(settings)
        drawn = np.asarray(jax.jit(lambda x, noise: run(
            apply, x, {'label': jnp.asarray(label)}, noise=noise if random else None,
            trajectory=settings.method != 'dopri5'))(x, noise))
    if settings.method == 'dopri5':
        states, drawn = [last.movedim(1, -1)], drawn[None]
    assert len(states) == len(drawn)
    np.testing.assert_allclose(torch.stack(states).numpy(), drawn, rtol=1e-6, atol=1e-6 * np.abs(drawn).max())


@pytest.mark.peers
@pytest.mark.parametrize('name, method', [('lightning lit', 'euler'), ('repa', 'heun')])
def test_a_folder_of_a_flow_draws_the_images_of_lit_jax(name, method, tmp_path):
    """Same noise and classes, float32, by the sampler that the model records; and back, bit for bit."""
    torch = pytest.importorskip('torch')
    model = saved(tmp_path, ARCHS[name], diffusion=FLOW,
                  sampling={'method': method, 'steps': 5, 'cfg_scale': 1.5})
    export(model, tmp_path / 'student', layout='lit')
    module = module_of((tmp_path / 'student' / 'modeling_lit.py').read_text())
    twin, config = module.load(tmp_path / 'student')
    network, label = Network(load_model_folder(model)[0]['model']), np.array([1, 3], np.int32)
    x = np.random.default_rng(1).standard_normal((2, *network.arch['input_size'], 3), np.float32)
    given, null = (torch.from_numpy(label),), (torch.full((2,), 5),)
    drawn = module.sample(module.guided(twin, given, null, 1.5), to_torch(torch, x), method, 5,
                          config['diffusion']).movedim(1, -1).numpy()
    settings = SamplerSettings().of_model(config)
    expected = jax.jit(build_sampler(network, settings, config))(weights(network.arch), x, {'label': label},
                                                                 jax.random.key(0))
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
    convert(tmp_path / 'student', tmp_path / 'back')
    (config, params), (again, back) = (load_model_folder(tmp_path / name) for name in ('model', 'back'))
    assert [config[name] for name in ('model', 'sampling')] == [again[name] for name in ('model', 'sampling')]
    assert again['diffusion'].items() >= FLOW.items()
    before, after = named_leaves(params), named_leaves(back)
    assert set(before) == set(after)
    assert all(np.array_equal(np.asarray(before[path]), np.asarray(after[path])) for path in before)


@pytest.mark.peers
def test_the_folder_draws_by_itself(tmp_path):
    pytest.importorskip('torch')
    export(saved(tmp_path, ARCHS['lightning'], diffusion=FLOW), tmp_path / 'student', layout='lit')
    command = [sys.executable, 'student/modeling_lit.py', '--classes=3,1', '--steps=3', '--out=drawn.png',
               '--device=cpu']
    done = subprocess.run([*command, '--shift=3', '--cfg_interval', '0', '0.8'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / 'drawn.png').size == (16, 8)
    done = subprocess.run([*command, '--method=sde', '--sde_form=sbdm'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and 'the form sbdm is not finite' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.peers
def test_the_exported_samplers_are_all_of_them():
    pytest.importorskip('torch')
    module = module_of(modeling_source(ARCHS['lit'], flow=True))
    assert set(module.SAMPLERS) == set(FLOW_METHODS)
    assert set(module.CHOICES['sde_form']) == set(FORMS) and module.CHOICES['last_step'] == LAST_STEPS
    usual = SamplerSettings()
    assert {name: getattr(usual, name) for name in module.OPTIONS} == module.OPTIONS
