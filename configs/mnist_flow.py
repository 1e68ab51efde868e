"""The flow teacher of MNIST: the network of configs/mnist_dit.py, which predicts a velocity instead of noise
and variance, with rotary positions as LightningDiT's.

    python train.py --config=configs/mnist_flow.py --workdir=runs/mnist_flow
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'mnist_flow'
    recipes.mnist(config)
    recipes.mnist_flow(config)
    config.model.mixer = recipes.mixer('softmax', heads=6, rope=True)
    config.train.update({'steps': 9_000, 'warmup_steps': 100, 'cooldown_steps': 3_000})
    config.checkpoint.update({'every': 500, 'keep_every': 500})
    return config
