"""LiT-0.6B, text to image at 512px (arXiv 2501.12976, §4.2): inherits from and is taught by PixArt-Σ.

Two heads, λ1 = 1.0, λ2 = 0.05.

    python convert_torch_ckpt.py PixArt-Sigma-XL-2-512-MS.pth --image_size 512 --out models/pixart_512
    python prepare_latents.py --data=captions --path=IMAGES --vae=models/sdxl_vae --text_encoder=models/t5 \
        --image_size=512 --out=latents_512
    python train.py --config=configs/lit_t2i_512.py --config.data.path=latents_512 --workdir=runs/lit_t2i_512
"""
from lit_jax import recipes


def get_config():
    config = recipes.default()
    config.name = 'lit_t2i_512'
    recipes.text_to_image(config, 512, 'linear')
    config.inherit.path = recipes.models_folder('pixart_512')
    config.teacher.path = recipes.models_folder('pixart_512')
    config.train.steps = 100_000      # the paper gives none
    return config
