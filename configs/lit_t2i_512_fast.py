"""LiT-0.6B at 512px from PixArt-Σ in a quarter of the steps of lit_t2i_512: alignment, then distillation.

    python train.py --config=configs/lit_t2i_512_fast.py --config.data.path=latents_512 \
        --workdir=runs/lit_t2i_512_fast
    python train.py --config=configs/lit_t2i_512_fast.py:every_4 --config.data.path=latents_512 \
        --workdir=runs/lit_t2i_512_hybrid

A row keeps some blocks of the teacher: every_4, first_2, last_2; --config.model.stages=0,7,14 any others
(`analyze.py --linearize` says which). Not trained by us."""
from lit_jax import recipes


def get_config(row=''):
    config = recipes.default()
    config.name = 'lit_t2i_512_fast'
    recipes.text_to_image(config, 512, 'linear')
    config.inherit.path = recipes.models_folder('pixart_512')
    config.teacher.path = recipes.models_folder('pixart_512')
    return recipes.fast(config, row, align_steps=5_000, steps=20_000)
