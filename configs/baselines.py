"""The systems that LiT is compared with, a row for each size: ImageNet 256px latents, 400K steps of 256.

    python train.py --config=configs/baselines.py:dig_xl --workdir=runs/dig_xl
    python train.py --config=configs/baselines.py:moh_dit_b_75 --workdir=runs/moh_dit_b_75

A row is a system and a size of lit_jax/recipes/systems.py: dig and udig (arXiv 2405.18428), dydi_lit
(2601.13683), sana (2410.10629), edit (2503.16726), moh_dit (2410.11842; _75: 75 % of its heads in use, else
90 %) and dit_kv (2403.04692). dig_xl_512: at 512 pixels. Learning rate 1e-4, EMA 0.9999. On 100 classes and
in the sizes of the DyDi-LiT paper: configs/sub_imagenet.py."""
from lit_jax import recipes
from lit_jax.recipes.systems import SYSTEMS, system
from lit_jax.runtime.errors import UserError

ROWS = {f'{name}_{size}': (name, size) for name in SYSTEMS if name not in ('dit', 'lit')
        for size in SYSTEMS[name].sizes if not size.startswith('dydi_')} | {'dig_xl_512': ('dig', 'xl')}


def get_config(row: str = ''):
    if row not in ROWS:
        what = f'no row {row!r}' if row else 'rows'
        raise UserError(f'configs/baselines.py has {what}; give one after the file, as in '
                        f'configs/baselines.py:dig_xl; its rows: {", ".join(ROWS)}')
    config = system(recipes.default(), *ROWS[row])
    config.name = row
    if row == 'dig_xl_512':
        config.data.image_size, config.train.remat = 512, 'dots'
    return config
