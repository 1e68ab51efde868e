"""A tiny text-to-image system with random weights: a PixArt on latents or pixels, a T5 encoder with a
tokenizer of words, a VAE."""
from sampling_models import SCALE, randomised, save_vae
from text_encoder_samples import random_params

from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.checkpoint.text_encoder_folder import save_text_encoder_folder
from lit_jax.data.toys.shapes_words import VOCABULARY, make_tokenizer
from lit_jax.models.network import Network
from lit_jax.text.tokenizer import Tokenizer

ENCODER = {'vocab': 3 + len(VOCABULARY), 'width': 16, 'layers': 2, 'heads': 2, 'head_dim': 6, 'ffn': 24,
           'buckets': 8, 'max_distance': 16}
TOKENS = 6
MIXERS = {'softmax': {'name': 'softmax', 'heads': 2, 'qkv_bias': True},
          'linear': {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 3, 'activation': 'relu',
                     'focus_power': 0}}


def save_text_model(path, *, space='vae', mixer='linear', encoder='tiny words', width=16, scale=SCALE,
                    **arch):
    """Latents [8, 8, 4] of the tiny VAE (images of 16 x 16), or RGB pixels of 8 x 8, or what `arch`
    changes."""
    import jax
    network = Network({'family': 'pixart', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8),
                       'base_size': 4,
                       'channels': 4 if space == 'vae' else 3, 'mixer': MIXERS[mixer], 'cross_heads': 2,
                       'caption_channels': width, 'caption_tokens': TOKENS, **arch})
    latent = {'space': 'vae', 'vae': 'tiny vae', 'scale': scale, 'downscale': 2} if space == 'vae' else {
        'space': 'pixels', 'vae': None, 'scale': scale}
    config = {'model': network.arch, 'classes': None, 'diffusion': {'steps': 1000, 'kind': 'linear'},
              'latent': latent, 'text': {'encoder': encoder, 'channels': width, 'tokens': TOKENS},
              'provenance': {'source': 'random'}}
    save_model_folder(path, config, randomised(jax.jit(network.init)(jax.random.key(0)), 0.1))
    return path


def save_words_encoder(path, *, width=16, id='tiny words'):
    """Knows the words of the shapes captions: VOCABULARY."""
    tokenizer = path.parent / f'{path.name}_tokenizer'
    make_tokenizer(tokenizer)
    arch = {**ENCODER, 'width': width}
    save_text_encoder_folder(path, {'text_encoder': arch, 'id': id}, random_params(arch),
                             Tokenizer.load(tokenizer))
    return path


def save_system(folder, **model):
    """{'source', 'text_encoder', 'vae'} of a system in `folder`, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {'source': save_text_model(folder / 'model', **model),
             'text_encoder': save_words_encoder(folder / 't5')}
    if model.get('space', 'vae') == 'vae':
        found['vae'] = save_vae(folder / 'vae')
    return {name: str(path) for name, path in found.items()}
