"""The MNIST teacher: a DiT on 28x28 handwritten digits, 49 tokens.

    python train.py --config=configs/mnist_dit.py --workdir=runs/mnist_dit
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'mnist_dit'
    recipes.mnist(config)
    config.model.mixer = recipes.softmax_mixer(heads=6)
    config.train.steps = 10_000
    config.train.warmup_steps = 100
    config.train.cooldown_steps = 3_000
    config.checkpoint.update({'every': 1_000, 'keep_every': 1_000})     # for make lab
    return config
