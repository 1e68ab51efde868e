"""Kinds of weights: our own folders, and other people's files on their way through the converter."""
import json
import pickle

import numpy as np
import sampling_models
import text_encoder_samples
import text_models
import torch_samples
import vae_samples
from fuzz.kinds import Kind
from safetensors.numpy import save_file
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.checkpoint.load import find_steps, load_weights, read_null_caption
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.checkpoint.text_encoder_folder import load_text_encoder
from lit_jax.checkpoint.vae_folder import load_vae, save_vae_folder
from lit_jax.checkpoint.workdir import claim_workdir
from lit_jax.convert.array_pickles import flat_names, read_arrays
from lit_jax.convert.text_encoder_torch import convert_text_encoder
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert
from lit_jax.convert.vae_torch import convert_vae
from lit_jax.models.network import Network
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.leaves import map_named
from lit_jax.text.tokenizer import Tokenizer

LINEAR = torch_samples.LINEAR
PIXART = {'family': 'pixart', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'base_size': 4,
          'channels': 4, 'mixer': text_models.MIXERS['linear'], 'cross_heads': 2, 'caption_channels': 16,
          'caption_tokens': 6}


def drawn(abstract, seed=0):
    """Normal numbers of the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return map_named(lambda name, leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract)


# Our own folders.

def _config(network, **more) -> dict:
    return {'model': {**network.arch, 'input_size': list(network.arch['input_size'])},
            'classes': [f'name {i}' for i in range(network.arch.get('num_classes', 0))] or None,
            'diffusion': {'steps': 1000, 'kind': 'linear'}, 'provenance': {'source': 'random'},
            'latent': {'space': 'pixels', 'vae': None, 'scale': 0.5}, **more}


def _model(folder):
    network = Network({'family': 'dit', 'depth': 2, 'width': 16, 'patch': 2, 'input_size': (8, 8),
                       'channels': 1, 'num_classes': 10, 'mixer': dict(LINEAR)})
    save_model_folder(folder / 'model', _config(network), drawn(network.abstract()))
    return folder / 'model'


def _text_model(folder):
    network = Network(PIXART)
    latent = {'space': 'vae', 'vae': 'tiny vae', 'scale': 0.5, 'downscale': 2}
    text = {'encoder': 'tiny words', 'channels': 16, 'tokens': 6}
    save_model_folder(folder / 'model', _config(network, latent=latent, text=text, classes=None),
                      drawn(network.abstract()), null_caption=np.ones((6, 16), np.float32))
    return folder / 'model'


def _vae(folder):
    network = VaeNetwork(sampling_models.VAE)
    config = {'vae': network.arch, 'id': 'tiny vae', 'scale': 0.5, 'provenance': {'source': 'random'}}
    return save_vae_folder(folder / 'vae', config, drawn(network.abstract()))


def _read_vae(path, _):
    vae = load_vae(path)
    return vae.config, vae.params


def _read_encoder(path, _):
    encoder = load_text_encoder(path, 'float32')
    return encoder.config, encoder.params, encoder.tokenizer.encode(['two red squares'], 12)


def _state(step: int) -> dict:
    params = drawn(_run_network().abstract(), step)
    return {'params': params, 'ema': map_named(lambda name, leaf: leaf * 2, params), 'step': np.int32(step)}


def _run_network() -> Network:
    return Network(recipes.architecture(tiny_recipe()))


def _workdir(folder):
    recipe = recipes.finalize(tiny_recipe(), 1)
    path, network = folder / 'run', _run_network()
    config = _config(network)
    claim_workdir(path, recipe.to_dict(), {name: config[name] for name in ('model', 'diffusion', 'latent',
                                                                           'classes')})
    with Checkpoints(path) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, _state(step), {'seen': step})
    return path


def _read_workdir(path, _, step=None):
    config, params = load_weights(path, step=step)
    return {**config, 'provenance': {**config['provenance'], 'source': '', 'step': None}}, params


def _older(path, folder):
    return [_read_workdir(path, folder, step) for step in find_steps(path)]


def _resume(path, _):
    found = Checkpoints(path).restore_latest(_state(0))
    return found if found is None else (found[0], found[1])


def _older_states(path, _):
    return [(_state(step), {'seen': step}) for step in (3, 6)]


# Other people's files.

def _converted(path, folder, into=convert, **options):
    out = path.parent / 'converted'
    into(path, out, **options)
    read = {convert: load_model_folder, convert_vae: _read_vae, convert_text_encoder: _read_encoder}[into]
    config, params, *rest = read(out) if into is convert else read(out, folder)
    return {**config, 'provenance': None, 'id': None, 'text': None}, params, rest


def _read_dit(path, folder):
    return _converted(path, folder, heads=2)


def _torch_file(folder, state, name='weights.pt', **options):
    import torch
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, folder / name,
               **options)
    return folder / name


def _dit_state():
    return torch_samples.random_state(torch_samples.tiny_arch())


def _dit_safetensors(folder):
    save_file(_dit_state(), folder / 'dit.safetensors', metadata={'format': 'pt'})
    return folder / 'dit.safetensors'


def _dit_training(folder):
    """As DiT's trainer saves it, with its command line."""
    import argparse

    import torch
    state = {key: torch.from_numpy(np.array(value)) for key, value in _dit_state().items()}
    torch.save({'model': state, 'ema': state, 'opt': {'state': {}}, 'args': argparse.Namespace(lr=1e-4)},
               folder / '0050000.pt')
    return folder / '0050000.pt'


def _own(folder):
    export(_model(folder), folder / 'own.safetensors')
    return folder / 'own.safetensors'


def _pixart(folder):
    network = Network(PIXART)
    arch = {**network.arch, 'input_size': list(network.arch['input_size'])}
    return _torch_file(folder, torch_samples.random_state(arch), 'pixart.pth')


def _hub_dit(folder):
    """A diffusers folder in two shards."""
    arch = torch_samples.tiny_arch()
    state = torch_samples.to_diffusers(_dit_state(), arch['depth'])
    path = folder / 'pipeline' / 'transformer'
    path.mkdir(parents=True)
    (path / 'config.json').write_text(json.dumps(torch_samples.hub_config(arch)))
    (folder / 'pipeline' / 'model_index.json').write_text(json.dumps(
        {'_class_name': 'DiTPipeline', 'id2label': {str(i): f'label {i}' for i in range(3)}}))
    names = [f'diffusion_pytorch_model-0000{i}-of-00002.safetensors' for i in (1, 2)]
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, path / name, metadata={'format': 'pt'})
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = path / 'diffusion_pytorch_model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': weight_map}))
    return folder / 'pipeline'


def _read_hub_dit(path, folder):
    return _converted(path / 'transformer', folder)


def _write_numpy_pickle(folder):
    (folder / 'weights.pickle').write_bytes(pickle.dumps({'a': {'kernel': np.arange(6.0, dtype=np.float32)},
                                                          'b': np.ones((2, 3), np.float64)}, protocol=4))
    return folder / 'weights.pickle'


def _arrays(path, _):
    return flat_names(read_arrays(path))


def _arrays_then_valid(path, folder):
    """A poisoned reader must not show in the next, valid file."""
    try:
        return _arrays(path, folder)
    finally:
        valid = next(file for file in folder.iterdir() if file.name == path.name)
        assert len(_arrays(valid, folder)) == 2, f'the valid file is read otherwise after {path.name}'


def _small_state():
    return {'a.kernel': np.arange(6, dtype=np.float32), 'b': np.ones((2, 3), np.float64)}


# The text encoder's tokenizer.

def _tokenizer_file(name, content):
    def make(folder):
        (folder / 'tokenizer').mkdir()
        (folder / 'tokenizer' / name).write_bytes(content())
        return folder / 'tokenizer'
    return make


def _tokens(path, _):
    return Tokenizer.load(path).encode(['two red squares left of the small one', '', 'ß🙂'], 12)


KINDS = (
    Kind('model folder', _model, lambda path, _: load_weights(path), 'whole', 3),
    Kind('text model folder', _text_model, lambda path, _: (load_weights(path), read_null_caption(path)),
         'whole', 3),
    Kind('VAE folder', _vae, _read_vae, 'whole', 3),
    Kind('text encoder folder', lambda folder: text_encoder_samples.write_text_encoder(folder / 't5'),
         _read_encoder, 'whole', 2),
    Kind('workdir', _workdir, _read_workdir, 'whole', 3, also=_older),
    Kind('checkpoints to resume', _workdir, _resume, 'whole', 3, also=_older_states),
    Kind('DiT safetensors', _dit_safetensors, _read_dit, weight=3),
    Kind('DiT checkpoint', _dit_training, _read_dit, weight=3),
    Kind('our own safetensors', _own, _converted, weight=3),
    Kind('PixArt checkpoint', _pixart, lambda path, folder: _converted(
        path, folder, cross_heads=2, expected={'image_size': 64}, heads=2), weight=3),
    Kind('diffusers folder', _hub_dit, _read_hub_dit, weight=3),
    Kind('diffusers VAE', lambda folder: vae_samples.write_hub_folder(folder / 'hub'),
         lambda path, folder: _converted(path, folder, convert_vae), weight=3),
    Kind('transformers T5', lambda folder: text_encoder_samples.write_hub_folder(folder / 'hub'),
         lambda path, folder: _converted(path, folder, convert_text_encoder, text_dtype='float32'), weight=2),
    Kind('torch zip of arrays', lambda folder: _torch_file(folder, _small_state()), _arrays_then_valid),
    Kind('torch stream of arrays', lambda folder: _torch_file(
        folder, _small_state(), _use_new_zipfile_serialization=False), _arrays_then_valid),
    Kind('pickle of arrays', _write_numpy_pickle, _arrays_then_valid),
    Kind('tokenizer.json', _tokenizer_file('tokenizer.json', text_encoder_samples.tokenizer_json), _tokens,
         weight=2),
    Kind('spiece.model', _tokenizer_file('spiece.model', text_encoder_samples.sentencepiece_model), _tokens),
)
