"""LiT-0.6B, text to image at 1024px (arXiv 2501.12976, §4.2): from the 512px student, taught by PixArt-Σ.

    python train.py --config=configs/lit_t2i_1024.py --config.inherit.path=runs/lit_t2i_512 \\
        --config.data.path=latents_1024 --workdir=runs/lit_t2i_1024
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_t2i_1024'
    recipes.text_to_image(config, 1024, 'linear')
    config.inherit.path = 'runs/lit_t2i_512'
    config.inherit.copy = 'all'           # its attention, too
    config.teacher.path = recipes.models_folder('pixart_1024')
    config.train.steps = 50_000           # the paper gives none
    config.train.batch_size = 128
    return config
