"""Systems with a recipe at full width, cut to two blocks: PyTorch, diffusers and ONNX Runtime give the
outputs and the images of lit_jax, within 2e-5 in float32."""
import sys

import jax
import numpy as np
import pytest
from student_archs import FLOW
from torchvision_shim import import_oracle

from lit_jax import recipes
from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.convert.torch_export import export
from lit_jax.deploy.export_model import export_model
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import Network
from lit_jax.recipes.systems import SYSTEMS
from lit_jax.runtime.leaves import named_leaves, unflatten
from lit_jax.sampling.program import build_sampler

pytestmark = [pytest.mark.slow, pytest.mark.peers]
LATENTS = {'input_size': [32, 32], 'channels': 4, 'num_classes': 1000}
VA_VAE = {'input_size': [16, 16], 'channels': 32, 'num_classes': 1000}
CAPTIONS = {'input_size': [32, 32], 'channels': 4, 'caption_channels': 4096, 'caption_tokens': 30,
            'base_size': 32}
NEAR = 2e-5
DDPM = {'kind': 'ddpm', 'steps': 1000, 'schedule': 'linear'}


def cut(model):
    """Two blocks of a model, of unlike kinds if it has such; U-DiG has at least five."""
    stages = model.get('stages') or ()
    if len(stages) > 1:
        return {**model, 'depth': 2, 'stages': [{**stages[i], 'depth': 1} for i in (0, -1)]}
    return {**model, 'depth': 5 if model['family'] == 'udig' else 2}


def models():
    """{name: (architecture, section `diffusion`)}, each as wide as it comes."""
    found = {}
    for name, system in SYSTEMS.items():
        widest = max(system.sizes.values(), key=lambda model: model['width'])
        found[name] = {**LATENTS, **widest}, DDPM
    lit = found['lit'][0]
    found['hybrid'] = {**lit, 'depth': 2, 'stages': ({'depth': 1}, {
        'depth': 1, 'mixer': dict(found['dit'][0]['mixer'])})}, DDPM
    found |= {'sit': (found['dit'][0], FLOW), 'lit of sit': (lit, FLOW)}
    for name, mixer in (('lightningdit', 'softmax'), ('lit of lightningdit', 'linear')):
        model = recipes.lightningdit(recipes.default(), mixer).model.to_dict()
        found[name] = {**model, **VA_VAE}, FLOW
    for name, mixer in (('pixart', 'softmax'), ('lit of pixart', 'linear')):
        model = recipes.text_to_image(recipes.default(), 256, mixer).model.to_dict()
        found[name] = {**model, **CAPTIONS}, DDPM
    return {name: (cut(model), diffusion) for name, (model, diffusion) in found.items()}


MODELS = models()


def weights(arch):
    """So large that every part has its say."""
    rng, found = np.random.default_rng(0), {}
    for path, leaf in named_leaves(Network(arch).abstract()).items():
        values = rng.standard_normal(leaf.shape, np.float32)
        size = values[0].size if path.startswith('blocks') else values.size
        values *= 0.02 if size > 100_000 else 0.1
        found[path] = values + np.float32('gain' in path)
    return unflatten(found)


def folder_of(name, tmp_path, **sampling):
    """(model folder, its network, its weights)."""
    arch, diffusion = MODELS[name]
    network = Network(arch)
    config = {'model': network.arch, 'classes': None, 'diffusion': diffusion,
              'provenance': {'source': 'random'}, 'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}}
    config |= {'sampling': sampling} if sampling else {}
    if 'caption_tokens' in arch:
        config['text'] = {'encoder': 't5', 'channels': 4096, 'tokens': arch['caption_tokens']}
        config['latent'] = {'space': 'vae', 'vae': 'tiny', 'scale': 1.0, 'downscale': 2}
    params = weights(arch)
    save_model_folder(tmp_path / 'model', config, params)
    return tmp_path / 'model', network, params


def opened(folder):
    """The module of a PyTorch folder."""
    module = type(sys)('modeling_lit')
    exec(compile((folder / 'modeling_lit.py').read_text(), 'modeling_lit.py', 'exec'), module.__dict__)
    return module


def run_onnx(folder, inputs):
    import onnxruntime
    session = onnxruntime.InferenceSession(str(folder / 'model.onnx'), providers=['CPUExecutionProvider'])
    return session.run(None, inputs)[0]


def first(array):
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def last(tensor):
    return np.moveaxis(tensor.numpy(), 1, -1)


@pytest.mark.parametrize('name', MODELS)
def test_outputs_are_those_of_lit_jax(name, tmp_path):
    torch, diffusers = pytest.importorskip('torch'), import_oracle('diffusers')
    pytest.importorskip('onnxruntime')
    model, network, params = folder_of(name, tmp_path)
    rng, flow = np.random.default_rng(1), MODELS[name][1] is FLOW
    x = rng.standard_normal((1, *network.arch['input_size'], network.arch['channels']), np.float32)
    t = np.array([0.37], np.float32) if flow else np.array([371], np.int32)
    if network.conditioning == 'label':
        cond = {'label': np.array([207], np.int32)}
    else:
        size = 1, network.arch['caption_tokens'], network.arch['caption_channels']
        cond = {'text': rng.standard_normal(size, np.float32), 'text_mask': np.ones(size[:2], np.int32)}
    expected = np.asarray(jax.jit(network.apply)(params, x, t, cond))
    near = {'rtol': 0, 'atol': NEAR * max(1, np.abs(expected).max())}
    assert 0.1 < np.abs(expected).max() < 100

    export_model(model, tmp_path / 'onnx', to='onnx')
    np.testing.assert_allclose(run_onnx(tmp_path / 'onnx', {'x': x, 't': t, **cond}), expected, **near,
                               err_msg='ONNX Runtime')
    tensors = [torch.from_numpy(array) for array in (first(x), t, *cond.values())]
    export(model, tmp_path / 'torch', layout='lit')
    with torch.no_grad():
        got = opened(tmp_path / 'torch').load(tmp_path / 'torch')[0](*tensors)
    np.testing.assert_allclose(last(got), expected, **near, err_msg='PyTorch')
    vae = None
    if name == 'lit of pixart':      # PixArtSigmaPipeline has one
        vae, small = tmp_path / 'vae', {'block_out_channels': (8,), 'norm_num_groups': 4}
        diffusers.AutoencoderKL(**small, latent_channels=4).save_pretrained(vae)
    export(model, tmp_path / 'pipeline', layout='diffusers', vae=vae)
    with torch.no_grad():
        got = last(transformer_of(diffusers, tmp_path / 'pipeline')(tensors, flow))
    np.testing.assert_allclose(got, expected[..., :got.shape[-1]], **near, err_msg='diffusers')


def transformer_of(diffusers, folder):
    """(tensors, flow) -> output of the transformer of a pipeline, or of the folder that diffusers has a class
    for."""
    if (folder / 'config.json').exists():
        model = diffusers.PixArtTransformer2DModel.from_pretrained(folder)
    else:
        model = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).transformer

    def run(tensors, flow):
        x, t, *cond = tensors
        if len(cond) == 2:
            return model(x, encoder_hidden_states=cond[0], encoder_attention_mask=cond[1], timestep=t,
                         added_cond_kwargs={'resolution': None, 'aspect_ratio': None}).sample
        output = model(x, 1000 * (1 - t) if flow else t, *cond).sample
        return -output if flow else output      # a velocity to the noise
    return run


@pytest.mark.parametrize('name', ['lit', 'hybrid', 'lit of sit', 'lit of lightningdit'])
def test_images_are_those_of_lit_jax(name, tmp_path):
    """Guided, of the same noise, by what the model records."""
    torch, diffusers = pytest.importorskip('torch'), import_oracle('diffusers')
    pytest.importorskip('onnxruntime')
    method = 'euler' if MODELS[name][1] is FLOW else 'dpm++'
    model, network, params = folder_of(name, tmp_path, method=method, steps=4, cfg_scale=1.5)
    config = load_model_folder(model)[0]
    x = np.random.default_rng(1).standard_normal(
        (1, *network.arch['input_size'], network.arch['channels']), np.float32)
    label = np.array([207], np.int32)
    run = jax.jit(build_sampler(network, SamplerSettings().of_model(config), config))
    expected = np.asarray(run(params, x, {'label': label}, jax.random.key(0)))
    near = {'rtol': 0, 'atol': NEAR * max(1, np.abs(expected).max())}

    export_model(model, tmp_path / 'onnx', to='onnx', sampler=True)
    np.testing.assert_allclose(run_onnx(tmp_path / 'onnx', {'noise': x, 'label': label}), expected, **near,
                               err_msg='ONNX Runtime')
    noise, y = torch.from_numpy(first(x)), torch.from_numpy(label)
    export(model, tmp_path / 'torch', layout='lit')
    module = opened(tmp_path / 'torch')
    twin = module.load(tmp_path / 'torch')[0]
    predict = module.guided(twin, (y,), (torch.full_like(y, 1000),), 1.5)
    got = last(module.sample(predict, noise, method, 4, config['diffusion']))
    np.testing.assert_allclose(got, expected, **near, err_msg='PyTorch')
    export(model, tmp_path / 'pipeline', layout='diffusers')
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'pipeline', trust_remote_code=True)
    got = last(pipe(class_labels=y, latents=noise, output_type='latent').images)
    np.testing.assert_allclose(got, expected, **near, err_msg='diffusers')
