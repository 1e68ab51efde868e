"""The PyTorch code that exports carry: the same outputs as lit_jax, for every mixer and family."""
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from student_archs import ARCHS, saved, weights
from torchvision_shim import import_oracle

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_export import export, export_student, to_torch_state
from lit_jax.convert.torch_import import convert
from lit_jax.convert.torch_pipeline import check_pipeline
from lit_jax.convert.torch_student import MIXERS, check_student, modeling_source
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.samplers import SAMPLERS, sampling_schedule
from lit_jax.models.arch import mixers_of
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

TESTS = Path(__file__).parents[1]


def load_source(text, tmp_path):
    file = tmp_path / 'modeling_lit.py'
    file.write_text(text)
    spec = importlib.util.spec_from_file_location('modeling_lit', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.peers
@pytest.mark.parametrize('name', ARCHS)
def test_outputs_are_those_of_lit_jax(name, tmp_path):
    torch = pytest.importorskip('torch')
    network = Network(ARCHS[name], dtype='float64')
    arch, params = network.arch, weights(ARCHS[name])
    module = load_source(modeling_source(arch), tmp_path)
    model = module.MODELS[arch['family']](arch)
    state = {key: torch.from_numpy(value) for key, value in to_torch_state(params, arch).items()
             if not key.startswith(module.UNUSED)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {'y_embedder.y_embedding'}
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((2, *arch['input_size'], 4)), np.array([3, 977])
    if arch['family'] == 'pixart':
        text, mask = rng.standard_normal((2, 7, 20)), np.array([[1] * 7, [1] * 4 + [0] * 3])
        cond, inputs = {'text': jnp.asarray(text), 'text_mask': jnp.asarray(mask)}, (text, mask)
    else:
        label = np.array([1, 5])
        cond, inputs = {'label': jnp.asarray(label)}, (label,)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        cond = {key: jnp.asarray(value) for key, value in cond.items()}
        expected = np.asarray(jax.jit(network.apply)(wide, jnp.asarray(x), jnp.asarray(t), cond))
    with torch.no_grad():
        got = model.eval().double()(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t),
                                    *(torch.from_numpy(array) for array in inputs))
    got = got.permute(0, 2, 3, 1).numpy()
    assert np.abs(expected).max() > 0.1
    # The position table is stored in float32.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    with torch.no_grad():
        narrow = model.bfloat16()(torch.from_numpy(x).bfloat16().permute(0, 3, 1, 2), torch.from_numpy(t), *(
            torch.from_numpy(array).bfloat16() if array.dtype == np.float64 else torch.from_numpy(array)
            for array in inputs))
    assert narrow.dtype == torch.bfloat16 and torch.isfinite(narrow).all()


@pytest.mark.peers
@pytest.mark.parametrize('method', ['ddpm', 'ddim', 'dpm++'])
def test_trajectories_are_those_of_lit_jax(method, tmp_path):
    torch = pytest.importorskip('torch')
    network, steps = Network(ARCHS['lit'], dtype='float64'), 6
    arch, params = network.arch, weights(ARCHS['lit'])
    module = load_source(modeling_source(arch), tmp_path)
    model = module.MODELS['dit'](arch)
    state = to_torch_state(params, arch)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 8, 8, 4)), rng.standard_normal((steps, 2, 8, 8, 4))
    label = torch.tensor([1, 3])
    predict, states = module.guided(model.double(), (label,), (torch.full_like(label, 5),), 1.5), []
    module.sample(predict, to_torch(torch, x), method, steps, noise=to_torch(torch, noise),
                  callback=lambda x: states.append(x.movedim(1, -1).numpy()))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        apply = guide(functools.partial(network.apply, wide), 1.5, network.guidance_pair)
        drawn = SAMPLERS[method](apply, jnp.asarray(x), {'label': jnp.array([1, 3])}, trajectory=True,
                                 schedule=sampling_schedule(method, steps),
                                 noise=jnp.asarray(noise) if method == 'ddpm' else None)
    drawn = np.asarray(drawn)
    np.testing.assert_allclose(np.stack(states), drawn, rtol=1e-4, atol=1e-4 * np.abs(drawn).max())


def to_torch(torch, array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def test_folder_comes_back_bit_for_bit(tmp_path):
    model = saved(tmp_path, ARCHS['hybrid'])
    export(model, tmp_path / 'student', layout='lit')
    assert {path.name for path in (tmp_path / 'student').iterdir()} == {
        'config.json', 'model.safetensors', 'modeling_lit.py'}
    compile((tmp_path / 'student' / 'modeling_lit.py').read_text(), 'modeling_lit.py', 'exec')
    convert(tmp_path / 'student', tmp_path / 'back')
    (config, params), (again, back) = (load_model_folder(tmp_path / name) for name in ('model', 'back'))
    assert config['model'] == again['model']
    before, after = named_leaves(params), named_leaves(back)
    assert set(before) == set(after)
    assert all(np.array_equal(np.asarray(before[path]), np.asarray(after[path])) for path in before)


def test_what_cannot_be_exported_is_told_and_nothing_written(tmp_path):
    model = saved(tmp_path, ARCHS['dit'])
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'file').touch()
    with pytest.raises(UserError, match='exists already'):
        export(model, tmp_path / 'other', layout='lit')
    with pytest.raises(UserError, match='not written by --layout lit'):
        export(model, tmp_path / 'other', layout='lit', overwrite=True)
    with pytest.raises(UserError, match='no PyTorch code of mine'):
        check_student({**ARCHS['dit'], 'mixer': {'name': 'mine'}})
    with pytest.raises(UserError, match='PixArtSigmaPipeline of diffusers, which needs a VAE, and this one'):
        check_pipeline({'model': ARCHS['pixart lit'], 'latent': {'space': 'pixels'}}, None)
    config, params = load_model_folder(model)
    params['final_layer']['linear']['bias'] = np.full_like(params['final_layer']['linear']['bias'], np.nan)
    with pytest.raises(UserError, match='final_layer.linear.bias holds NaN'):
        export_student(tmp_path / 'student', config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'other']


@pytest.mark.peers
def test_the_folder_draws_by_itself(tmp_path):
    pytest.importorskip('torch')
    export(saved(tmp_path, ARCHS['lit']), tmp_path / 'student', layout='lit')
    command = [sys.executable, 'student/modeling_lit.py', '--steps=3', '--out=drawn.png', '--device=cpu']
    done = subprocess.run([*command, '--classes', '3,1'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / 'drawn.png').size == (16, 8)
    done = subprocess.run([*command, '--classes', '9'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'this model has 0 to 4' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.peers
def test_diffusers_opens_the_pipeline_and_draws_as_lit_jax(tmp_path):
    """Same noise, same classes, DPM-Solver++: the latents of both."""
    torch, diffusers = pytest.importorskip('torch'), import_oracle('diffusers')
    model = saved(tmp_path, ARCHS['hybrid'], sampling={'method': 'dpm++', 'steps': 6, 'cfg_scale': 1.5})
    export(model, tmp_path / 'pipeline', layout='diffusers')
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'pipeline', trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    options = {'class_labels': [1, 3], 'guidance_scale': 1.5, 'num_inference_steps': 6}
    drawn = pipe(latents=to_torch(torch, x), output_type='latent', **options).images.movedim(1, -1).numpy()
    network = Network({**ARCHS['hybrid'], 'channels': 3})
    model = functools.partial(jax.jit(network.apply), weights(network.arch))
    apply = guide(model, 1.5, network.guidance_pair)
    expected = np.asarray(SAMPLERS['dpm++'](apply, jnp.asarray(x), {'label': jnp.array([1, 3])},
                                            schedule=sampling_schedule('dpm++', 6)))
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    images = pipe.to(torch.bfloat16)(generator=torch.Generator().manual_seed(0), **options).images
    assert [image.size for image in images] == [(8, 8)] * 2


@pytest.mark.peers
@pytest.mark.slow
def test_a_fresh_process_draws_from_prompts(tmp_path):
    """PixArtSigmaPipeline with our transformer and a VAE of its own, by features of prompts."""
    diffusers = import_oracle('diffusers')
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                  down_block_types=('DownEncoderBlock2D',) * 2,
                                  up_block_types=('UpDecoderBlock2D',) * 2)
    vae.save_pretrained(tmp_path / 'vae')
    latent = {'space': 'vae', 'vae': 'tiny', 'scale': 0.18215, 'downscale': 2}
    model = saved(tmp_path, ARCHS['pixart lit'], channels=4, latent=latent, text={
        'encoder': 'tiny', 'channels': 20, 'tokens': 7})
    with pytest.raises(UserError, match='needs the VAE of the model .tiny., and none is given'):
        export(model, tmp_path / 'pipeline', layout='diffusers')
    with pytest.raises(UserError, match='is no folder of an AutoencoderKL'):
        export(model, tmp_path / 'pipeline', layout='diffusers', vae=tmp_path / 'nowhere')
    export(model, tmp_path / 'pipeline', layout='diffusers', vae=tmp_path / 'vae')
    code = """
import sys, torch
from student_archs import ARCHS, saved, weights
from torchvision_shim import import_oracle
DiffusionPipeline = import_oracle('diffusers').DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
text, mask = torch.randn(1, 7, 20), torch.ones(1, 7)
images = pipe(prompt_embeds=text, prompt_attention_mask=mask, negative_prompt=None,
              negative_prompt_embeds=text * 0, negative_prompt_attention_mask=mask, num_inference_steps=3,
              use_resolution_binning=False, height=16, width=16).images
print(images[0].size)
"""
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'pipeline')], capture_output=True,
                          cwd=TESTS, text=True)
    assert done.returncode == 0 and '(16, 16)' in done.stdout, done.stderr[-3000:]


def test_every_mixer_is_tested():
    assert set(MIXERS) == {mixer['name'] for arch in ARCHS.values() for mixer in mixers_of(arch)}
