"""Small models of every system, with random weights, for tests of what leaves the house."""
import numpy as np

from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.models.mixers import find_mixer
from lit_jax.models.network import Network
from lit_jax.runtime.leaves import named_leaves, unflatten

SIZES = {'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 4, 'learn_sigma': True,
         'mlp_ratio': 4.0, 'stages': ()}
CLASSES = {**SIZES, 'family': 'dit', 'num_classes': 5, 'ffn': 'mlp'}
FLOW = {'kind': 'flow', 'path': 'linear', 'prediction': 'velocity', 'noise_at': 0}
UDIG = {**{name: value for name, value in CLASSES.items() if name != 'stages'}, 'family': 'udig', 'depth': 10,
        'patch': 1, 'ffn': 'swiglu', 'order': 'official', 'local': 'identity'}
DIG = {**UDIG, 'family': 'dig', 'depth': 5, 'patch': 2, 'skip': 'none'}
PIXART = {**SIZES, 'family': 'pixart', 'ffn': 'mlp', 'cross_heads': 4, 'caption_channels': 20,
          'caption_tokens': 7, 'base_size': 4, 'pe_interpolation': 1.0}


def mixer(name, **options):
    return {'name': name, **find_mixer(name).defaults(), 'heads': 2, **options}


GLA = mixer('gla')
LIGHTNING = {**CLASSES, 'learn_sigma': False, 'norm': 'rms', 'shift': False, 'ffn': 'swiglu_bias'}
ARCHS = {
    'dit': {**CLASSES, 'mixer': mixer('softmax')},
    'compressed': {**CLASSES, 'mixer': mixer('softmax'),
                   'stages': ({'depth': 1}, {'depth': 1, 'mixer': {'compress': 2}})},
    'lit': {**CLASSES, 'mixer': mixer('linear')},
    'focused': {**CLASSES, 'mixer': mixer('linear', focus_power=3, focus_scale=True, key_grid=(4, 4))},
    'gelu': {**CLASSES, 'learn_sigma': False,
             'mixer': mixer('linear', activation='gelu', dwc_kernel=0, qkv_bias=True)},
    'hybrid': {**CLASSES, 'mixer': mixer('linear'),
               'stages': ({'depth': 1}, {'depth': 1, 'mixer': mixer('softmax')})},
    'sana': {**CLASSES, 'mixer': mixer('sana'), 'ffn': 'mix'},
    'edit': {**CLASSES, 'mixer': mixer('edit'), 'input_size': (10, 8)},
    'moh': {**CLASSES, 'mixer': mixer('moh', heads=4, shared=2, routed=1)},
    'dydila': {**CLASSES, 'mixer': mixer('dydila'), 'ffn': 'mix'},
    'dydila maps': {**CLASSES, 'mixer': mixer('dydila', difference='maps', normaliser='weights',
                                              dwc='single', separate_banks=True)},
    'dig': {**DIG, 'mixer': GLA},
    'dig skip': {**DIG, 'depth': 6, 'skip': 'skip', 'order': 'algorithm1', 'mixer': GLA},
    'dig of three heads': {**DIG, 'width': 48, 'mixer': mixer('gla', heads=3)},     # 3 does not divide 16
    'gla four': {**CLASSES, 'mixer': mixer('gla', directions='four', value_gate=True, norm='layer',
                                           gate_bias=True)},
    'udig': {**UDIG, 'mixer': GLA},
    'lightning': {**LIGHTNING, 'mixer': mixer('softmax', qk_norm='rms', rope=True)},
    'lightning lit': {**LIGHTNING, 'mixer': mixer('linear', rope=True), 'input_size': (8, 12),
                      'stages': ({'depth': 1}, {'depth': 1, 'mixer': mixer('softmax', heads=4, qk_norm='rms',
                                                                           rope=True)})},
    'repa': {**CLASSES, 'mixer': mixer('softmax', qk_norm='layer'),
             'projectors': {'block': 1, 'width': 24, 'features': (12, 8)}},
    'pixart': {**PIXART, 'mixer': mixer('softmax')},
    'pixart lit': {**PIXART, 'mixer': mixer('linear')},
}


def weights(arch):
    rng = np.random.default_rng(0)
    shapes = named_leaves(Network(arch).abstract())

    def draw(path, leaf):
        fan = np.prod(leaf.shape[-2:]) ** 0.5 if 'kernel' in path or 'proj' in path else 4
        return rng.standard_normal(leaf.shape) / max(fan, 4) + ('gain' in path)
    return unflatten({path: draw(path, leaf).astype(np.float32) for path, leaf in shapes.items()})


def saved(tmp_path, arch, channels=3, **changes):
    """A model folder of images of 8 x 8 pixels."""
    arch = {**arch, 'channels': channels}
    config = {'model': {**Network(arch).arch, 'input_size': list(arch['input_size'])}, 'classes': None,
              'diffusion': {'steps': 1000, 'kind': 'linear'}, 'provenance': {'source': 'random'},
              'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}, **changes}
    save_model_folder(tmp_path / 'model', config, weights(arch))
    return tmp_path / 'model'
