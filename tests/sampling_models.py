"""Models and VAEs of a few kilobytes, with random weights, for what draws images."""
import jax
import numpy as np
from draws import random_tree

from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.checkpoint.vae_folder import save_vae_folder
from lit_jax.models.network import Network
from lit_jax.models.vae import VaeNetwork

SCALE = 300.0      # random weights draw large numbers; divided by this they fill the range of an image
VAE = {'widths': (8, 8), 'layers': 1, 'groups': 4, 'channels': 4, 'image_channels': 3}


def randomised(params, size: float, seed: int = 0):
    """Parameters with normal noise on every leaf: fresh ones of a DiT give zeros."""
    return jax.tree.map(lambda leaf, noise: np.asarray(leaf) + np.asarray(noise), params,
                        random_tree(params, seed, size))


def save_model(path, *, mixer: str = 'softmax', latent: dict | None = None, classes: bool = True,
               seed: int = 0, diffusion: dict | None = None, **arch):
    """A model folder: 10 classes of grey 8 x 8 pixels, or what `arch` and `latent` change."""
    mixers = {'softmax': {'name': 'softmax', 'heads': 2, 'qkv_bias': True},
              'linear': {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 3,
                         'activation': 'relu', 'focus_power': 0}}
    network = Network({'family': 'dit', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8),
                       'channels': 1, 'num_classes': 10, 'mixer': mixers[mixer], **arch})
    names = [f'name {i}' for i in range(network.null_label)] if classes else None
    config = {'model': {**network.arch, 'input_size': list(network.arch['input_size'])}, 'classes': names,
              'diffusion': diffusion or {'steps': 1000, 'kind': 'linear'},
              'provenance': {'source': 'random'},
              'latent': latent or {'space': 'pixels', 'vae': None, 'scale': SCALE}}
    save_model_folder(path, config, randomised(jax.jit(network.init)(jax.random.key(0)), 0.05, seed))
    return path


def save_latent_model(path, *, vae='tiny vae', scale=SCALE, **arch):
    """A model of 4-channel latents, [8, 8, 4], decoded to images of 16 x 16."""
    return save_model(path, latent={'space': 'vae', 'vae': vae, 'scale': scale, 'downscale': 2}, channels=4,
                      **arch)


def save_vae(path, *, id='tiny vae', scale=SCALE):
    network = VaeNetwork(VAE)
    config = {'vae': network.arch, 'id': id, 'scale': scale, 'provenance': {'source': 'random'}}
    save_vae_folder(path, config, randomised(jax.jit(network.init)(jax.random.key(1)), 0.05))
    return path
