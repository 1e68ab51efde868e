"""The smallest recipe of the tests: the digits recipe itself, with its sizes turned down."""
from lit_jax import config as recipes


def tiny_recipe(mixer: str = 'softmax', **train):
    """Digits or synthetic pictures, depth 2, width 32; extra arguments go to config.train."""
    config = recipes.digits(recipes.default())
    config.name = f'tiny_{mixer}'
    config.data.name = 'synthetic'
    config.model.update({'depth': 2, 'width': 32, 'patch': 2})
    config.model.mixer = {'softmax': recipes.softmax_mixer, 'linear': recipes.linear_mixer}[mixer](2)
    config.train.update({'steps': 6, 'batch_size': 16, 'learning_rate': 1e-3, 'dtype': 'float32', **train})
    config.log.every, config.checkpoint.every, config.sample.every = 2, 3, 0
    return config
