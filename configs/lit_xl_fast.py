"""LiT-XL/2 from DiT-XL/2 at a twentieth of the teacher's FLOPs: alignment, then distillation.

    python train.py --config=configs/lit_xl_fast.py --workdir=runs/lit_xl_fast
    python train.py --config=configs/lit_xl_fast.py:every_4 --workdir=runs/lit_xl_hybrid

A row keeps some blocks of the teacher: every_4, first_2, last_2; --config.model.stages=0,7,14 any others
(`analyze.py --linearize` says which). 60,000 steps of alignment and 230,000 of distillation, whose learning
rate falls to 0 over the last three quarters, are 5 % of the FLOPs of the teacher's 7M steps. Not trained by
us."""
from lit_jax import recipes


def get_config(row=''):
    config = recipes.default()
    config.name = 'lit_xl_fast'
    recipes.size(config, 'xl', 'linear')
    config.inherit.path = recipes.models_folder('dit_xl')
    config.teacher.path = recipes.models_folder('dit_xl')
    return recipes.fast(config, row, align_steps=60_000, steps=230_000)
