"""Flows in PyTorch: samplers, guidance and folders of exports draw as lit_jax does."""
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from student_archs import ARCHS, FLOW, saved, weights
from torchvision_shim import import_oracle

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert
from lit_jax.convert.torch_student import modeling_source, scheduler_source
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
    check_the_way_back(tmp_path, 'student')


def check_the_way_back(tmp_path, folder):
    """The folder as a model folder: that of before, bit for bit."""
    convert(tmp_path / folder, tmp_path / 'back')
    (config, params), (again, back) = (load_model_folder(tmp_path / name) for name in ('model', 'back'))
    assert all(config[name] == again[name] for name in ('model', 'sampling', 'diffusion'))
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


DRAWN = [('lightning lit', FLOW, 'euler', ('diffusers', 'FlowMatchEulerDiscreteScheduler')),
         ('lit', {**FLOW, 'noise_at': 1}, 'dpm++', ('diffusers', 'DPMSolverMultistepScheduler')),
         ('repa', {**FLOW, 'path': 'gvp'}, 'heun', ('scheduling_lit', 'LiTFlowScheduler'))]


def pipeline_of(tmp_path, name, section, method):
    """The folder of a pipeline, (its inputs, the latents that lit_jax draws from them)."""
    model = saved(tmp_path, ARCHS[name], diffusion=section,
                  sampling={'method': method, 'steps': 5, 'cfg_scale': 1.5})
    export(model, tmp_path / 'pipeline', layout='diffusers')
    config = load_model_folder(model)[0]
    network, label = Network(config['model']), np.array([1, 3], np.int32)
    x = np.random.default_rng(1).standard_normal((2, *network.arch['input_size'], 3), np.float32)
    settings = SamplerSettings(cfg_interval=(0.15, 0.85)).of_model(config)
    run = jax.jit(build_sampler(network, settings, config))
    return x, np.asarray(run(weights(network.arch), x, {'label': label}, jax.random.key(0)))


@pytest.mark.peers
@pytest.mark.parametrize('name, section, method, scheduler', DRAWN, ids=[row[2] for row in DRAWN])
def test_diffusers_draws_a_flow_as_lit_jax(name, section, method, scheduler, tmp_path):
    torch, diffusers = pytest.importorskip('torch'), import_oracle('diffusers')
    x, expected = pipeline_of(tmp_path, name, section, method)
    index = json.loads((tmp_path / 'pipeline' / 'model_index.json').read_text())
    assert tuple(index['scheduler']) == scheduler
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'pipeline', trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    options = {'class_labels': [1, 3], 'guidance_interval': (0.15, 0.85)}
    drawn = pipe(latents=to_torch(torch, x), output_type='latent', **options).images.movedim(1, -1).numpy()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
    check_the_way_back(tmp_path, 'pipeline')
    images = pipe.to(torch.bfloat16)(generator=torch.Generator().manual_seed(0), num_inference_steps=3,
                                     guidance_scale=2.0, **options).images
    assert [image.size for image in images] == [x.shape[2:0:-1]] * 2


@pytest.mark.peers
@pytest.mark.parametrize('method', ['sde', 'sde_heun', 'heun2'])
def test_the_scheduler_steps_as_the_sampler(method):
    """With the same noise; its first part may be in the initial noise."""
    torch, _ = pytest.importorskip('torch'), import_oracle('diffusers')
    module = module_of(modeling_source(ARCHS['lit'], flow=True))
    scheduler = module_of(scheduler_source()).LiTFlowScheduler(method=method, path='gvp')
    scheduler.set_timesteps(6)
    flow = {**FLOW, 'path': 'gvp', 'noise_at': 1}
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x *= scheduler.init_noise_sigma
    shape, generator = x.shape, torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(shape, generator=generator, dtype=x.dtype) for _ in range(6)])
    first = float(scheduler.rows[0].before)
    noise = torch.cat([torch.ones_like(noise[:1]), noise]) if first else noise
    expected = module.sample(lambda x, t, decided: torch.sin(x * (1 + t)), x - first * noise[0], method, 6,
                             flow, noise=noise)
    generator.manual_seed(1)
    for t, row in zip(scheduler.timesteps, scheduler.rows, strict=True):
        assert abs(float(t) / 1000 - (1 - row.time)) < 1e-6
        x = scheduler.step(torch.sin(x * (2 - row.time)), t, x, generator=generator).prev_sample
    np.testing.assert_allclose(x.numpy(), expected.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.peers
@pytest.mark.slow
def test_a_fresh_process_opens_the_pipeline_of_a_flow(tmp_path):
    """With a scheduler whose code is in the folder."""
    import_oracle('diffusers')
    x, expected = pipeline_of(tmp_path, 'lit', {**FLOW, 'path': 'gvp', 'prediction': 'noise'}, 'heun2')
    np.save(tmp_path / 'noise.npy', np.moveaxis(x, -1, 1))
    code = """
import sys
import numpy as np
import torch
from torchvision_shim import import_oracle
DiffusionPipeline = import_oracle('diffusers').DiffusionPipeline
assert 'lit_jax' not in sys.modules
folder = sys.argv[1]
pipe = DiffusionPipeline.from_pretrained(folder + '/pipeline', trust_remote_code=True)
options = {'class_labels': [1, 3], 'guidance_interval': (0.15, 0.85)}
drawn = pipe(latents=torch.from_numpy(np.load(folder + '/noise.npy')), output_type='latent', **options).images
np.save(folder + '/drawn.npy', drawn.movedim(1, -1).numpy())
pipe.save_pretrained(folder + '/saved')
images = pipe.to(torch.bfloat16)(generator=torch.Generator().manual_seed(0), num_inference_steps=3,
                                 guidance_scale=1.0, output_type='np', **options).images
print(images.shape)
"""
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and '(2, 8, 8, 3)' in done.stdout, done.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / 'drawn.npy'), expected, rtol=0,
                               atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.peers
def test_the_exported_samplers_are_all_of_them():
    pytest.importorskip('torch')
    module = module_of(modeling_source(ARCHS['lit'], flow=True))
    assert set(module.SAMPLERS) == set(FLOW_METHODS)
    assert set(module.CHOICES['sde_form']) == set(FORMS) and module.CHOICES['last_step'] == LAST_STEPS
    usual = SamplerSettings()
    assert {name: getattr(usual, name) for name in module.OPTIONS} == module.OPTIONS
