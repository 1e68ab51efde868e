"""The digits teacher: a DiT on scikit-learn's 8x8 handwritten digits. Four minutes on two cores.

    python train.py --config=configs/digits_dit.py --workdir=runs/digits_dit
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'digits_dit'
    recipes.digits(config)
    config.model.mixer = recipes.softmax_mixer(heads=4)
    config.train.steps = 5_000
    config.train.warmup_steps = 100
    config.checkpoint.every = 1_000
    config.sample.every = 2_000
    return config
