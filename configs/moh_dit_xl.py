"""MoH-DiT-XL/2 (arXiv 2410.11842) on ImageNet 256px latents, with 90 % of its heads in use, or 75 %: 400K
steps of 256.

    python train.py --config=configs/moh_dit_xl.py --workdir=runs/moh_dit_xl
    python train.py --config=configs/moh_dit_xl.py:75 --workdir=runs/moh_dit_xl_75
"""
from lit_jax import recipes
from lit_jax.recipes.systems import system
from lit_jax.runtime.errors import UserError


def get_config(heads: str = '90'):
    if heads not in ('90', '75'):
        raise UserError(f'configs/moh_dit_xl.py:{heads} is not known; give 75, or 90 (or nothing) for the '
                        f'share of the heads')
    size = 'xl' if heads == '90' else 'xl_75'
    config = recipes.default()
    config.name = f'moh_dit_{size}'
    return system(config, 'moh_dit', size)
