"""The smallest recipe of the tests: the digits recipe itself, with its sizes turned down."""
from lit_jax import recipes

# A small PixArt architecture, complete.
PIXART = {'family': 'pixart', 'depth': 3, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 4,
          'cross_heads': 4,
          'caption_channels': 20, 'caption_tokens': 7, 'base_size': 4, 'pe_interpolation': 1.0,
          'mixer': {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 5, 'activation': 'relu',
                    'focus_power': 0}}


def tiny_recipe(mixer: str = 'softmax', **train):
    """Digits or synthetic images, depth 2, width 32; extra arguments go to config.train."""
    config = recipes.digits(recipes.default())
    config.name = f'tiny_{mixer}'
    config.data.name = 'synthetic'
    config.model.update({'depth': 2, 'width': 32, 'patch': 2})
    config.model.mixer = {'softmax': recipes.softmax_mixer, 'linear': recipes.linear_mixer}[mixer](2)
    config.train.update({'steps': 6, 'batch_size': 16, 'learning_rate': 1e-3, 'dtype': 'float32', **train})
    config.log.every, config.checkpoint.every, config.sample.every = 2, 3, 0
    return config
