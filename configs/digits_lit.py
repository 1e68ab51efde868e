"""The digits student: a LiT that inherits from the teacher and is distilled in a fifth of its training steps.

The teacher is the shipped one of assets/, converted by `make demo` (or by the command below), or any workdir:

    python convert_torch_ckpt.py assets/digits_dit.safetensors --out models/digits_dit
    python train.py --config=configs/digits_lit.py --workdir=runs/digits_lit
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'digits_lit'
    recipes.digits(config)
    config.model.mixer = recipes.linear_mixer(heads=2)
    config.model.mixer.dwc_kernel = 3        # the grid has 4x4 tokens
    config.train.steps = 1_000               # a fifth of the teacher's
    config.checkpoint.every = 500
    config.sample.every = 1_000
    config.inherit.path = recipes.models_folder('digits_dit')
    config.teacher.path = recipes.models_folder('digits_dit')
    return config
