"""The student of the rendered shapes: a LiT from the small PixArt, distilled in a fraction of its steps.

The teacher and its text encoder ship in assets/; `make demo-t2i` converts them, or:

    python convert_torch_ckpt.py assets/shapes_t5 --out models/shapes_t5
    python convert_torch_ckpt.py assets/shapes_pixart.safetensors --out models/shapes_pixart
    python train.py --config=configs/shapes_lit.py --workdir=runs/shapes_lit
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'shapes_lit'
    recipes.shapes(config)
    config.model.mixer = recipes.linear_mixer(heads=4)
    config.teacher.update({'lambda_noise': 1.0, 'lambda_variance': 0.05})
    # A fifth of the teacher's 4,000 + 14,500 steps; the rate falls all the way.
    config.train.update({'steps': 3_700, 'optimizer': 'muon', 'learning_rate': 2e-3, 'warmup_steps': 100,
                         'cooldown_steps': 3_600, 'clip_norm': 0.0, 'ema_decay': 0.99})
    config.checkpoint.every = 1_000
    config.inherit.path = recipes.models_folder('shapes_pixart')
    config.teacher.path = recipes.models_folder('shapes_pixart')
    return config
