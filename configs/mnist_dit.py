"""The MNIST teacher: a DiT on 28x28 handwritten digits, 49 tokens.

    python train.py --config=configs/mnist_dit.py --workdir=runs/mnist_dit
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'mnist_dit'
    recipes.mnist(config)
    config.model.mixer = recipes.softmax_mixer(heads=6)
    config.train.update({'steps': 9_000, 'warmup_steps': 100, 'cooldown_steps': 3_000})
    config.checkpoint.update({'every': 500, 'keep_every': 500})     # for make lab
    return config
