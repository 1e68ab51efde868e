"""LiT on a folder of one's own images (class = subfolder), inheriting from a DiT trained on the same.

    python prepare_latents.py --data=folder --path=images --vae=models/vae_tiny --image_size=64 \\
        --out=latents/images
    python train.py --config=configs/folder_lit.py:dit --config.data.path=latents/images \\
        --workdir=runs/folder_dit
    python train.py --config=configs/folder_lit.py --config.data.path=latents/images \
        --config.inherit.path=runs/folder_dit --config.teacher.path=runs/folder_dit --workdir=runs/folder_lit

Sizes and steps suit a few thousand small images on a CPU; docs/train/photos.md walks through it. For the
released VAE set latent.vae, latent.scale and latent.downscale back to the defaults of
lit_jax/recipes/recipe.py, and the model to one of SIZES."""
from lit_jax import recipes
from lit_jax.runtime.errors import UserError


def get_config(model: str = 'lit'):
    if model not in ('lit', 'dit'):
        raise UserError(f'configs/folder_lit.py:{model} is not known; give dit (the teacher) or nothing (the '
                        f'student)')
    config = recipes.default()
    config.name = f'folder_{model}'
    config.data.update({'image_size': 64, 'num_classes': 16})
    # the scale is in the VAE's config.json
    config.latent.update({'vae': 'vae_tiny', 'downscale': 4, 'scale': 1.0})
    config.model.update({'depth': 4, 'width': 96, 'patch': 2})
    config.model.mixer = recipes.softmax_mixer(4) if model == 'dit' else recipes.linear_mixer(2)
    config.train.update({'steps': 2_000 if model == 'dit' else 400, 'batch_size': 32, 'learning_rate': 1e-3,
                         'ema_decay': 0.999, 'ema_warmup': True, 'dtype': 'float32', 'scan_layers': False})
    config.sample.update({'every': 1_000, 'count': 32, 'cfg_scale': 2.0})
    config.checkpoint.every = 500
    if model == 'lit':
        config.inherit.path = config.teacher.path = 'runs/folder_dit'
        config.sample.every = 400
    return config
