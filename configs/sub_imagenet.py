"""Any system on Sub-ImageNet, the 100 classes of the DyDi-LiT paper's comparison: 100,600 steps of 256.

    python train.py --config=configs/sub_imagenet.py:dydi_lit_s --workdir=runs/sub_dydi_lit_s
    python train.py --config=configs/sub_imagenet.py:dit_dydi_l_512 --workdir=runs/sub_dit_l_512

The name is a system and a size of lit_jax/recipes/systems.py, and _512 for 512 pixels; `dit` and `dig` have
the paper's sizes as dydi_s, dydi_b and dydi_l. Rows with the published figures: configs/paper/dydi_table1.py.
The authors' list of classes is not published and this one is another (lit_jax/data/subset.py): figures can be
compared in trend only.

Latents of all of ImageNet will do: the classes are chosen by their labels. To make no others:

    python prepare_latents.py --data=imagenet2012 --classes=sub_imagenet --vae=models/sd_vae \\
        --image_size=256 --out=FOLDER
"""
from lit_jax import recipes
from lit_jax.recipes.systems import SYSTEMS, sub_imagenet, system
from lit_jax.runtime.errors import UserError

NAMES = {f'{name}_{size}': (name, size) for name, entry in SYSTEMS.items() for size in entry.sizes}


def get_config(model: str = 'dydi_lit_s'):
    name = model.removesuffix('_512')
    if name not in NAMES:
        raise UserError(f'configs/sub_imagenet.py:{model} is not known; give one of {", ".join(NAMES)}, with '
                        f'_512 behind it for 512 pixels')
    config = system(recipes.default(), *NAMES[name])
    config.name = f'sub_imagenet_{model}'
    if NAMES[name][0] in ('dig', 'udig'):
        config.train.dtype = 'float32'      # as the authors of the comparison trained it
    return sub_imagenet(config, 512 if model != name else 256)
