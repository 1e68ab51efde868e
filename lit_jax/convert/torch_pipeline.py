"""Writes a student as a pipeline folder of diffusers, with the code of its model in it.

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)

opens it: models of classes as `LiTPipeline` (lit_jax/convert/twins/pipeline_twin.py), text models as the
PixArtSigmaPipeline of diffusers with our transformer."""
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lit_jax.checkpoint.model_folder import CONFIG
from lit_jax.convert.torch_student import MODELING, PIECES, modeling_source
from lit_jax.convert.vae_torch import is_hub_vae
from lit_jax.diffusion.settings import CLASSES, PROMPTS
from lit_jax.models.arch import conditioning
from lit_jax.models.facts import has_null_class
from lit_jax.runtime.errors import UserError

INDEX, PIPELINE = 'model_index.json', 'pipeline_lit.py'
HUB_WEIGHTS = 'diffusion_pytorch_model.safetensors'
PREFIX = 'model.'      # of the weights' names: the transformer wraps the model
_MODEL = [MODELING.removesuffix('.py'), 'LiTTransformer2DModel']
_SOLVER = {'algorithm_type': 'dpmsolver++', 'solver_order': 2, 'solver_type': 'midpoint',
           'final_sigmas_type': 'zero', 'lower_order_final': True}


def check_pipeline(config: Mapping, vae) -> None:
    """UserError where the folder of the VAE is missing, wrong, or not wanted."""
    latents = config['latent']['space'] != 'pixels'
    if not latents and vae:
        raise UserError(f'the model draws pixels; leave --vae {vae} out')
    if latents and not (vae and is_hub_vae(Path(vae))):
        given = f'{vae} is no folder of an AutoencoderKL of diffusers' if vae else 'none is given'
        raise UserError(f'the pipeline needs the VAE of the model ({config["latent"]["vae"]}), and {given}. '
                        f'Give its folder of diffusers: --vae FOLDER')


def write_pipeline(folder: Path, config: Mapping, vae, write_weights: Callable[[Path], None]) -> None:
    """The whole folder; `write_weights` makes the file of the weights, whose names begin with PREFIX."""
    arch = config['model']
    text = conditioning(arch) == 'text'
    transformer = folder / 'transformer'
    (folder / 'scheduler').mkdir(parents=True), transformer.mkdir()
    _write(transformer / CONFIG, _transformer(arch))
    (transformer / MODELING).write_text(modeling_source(arch, wrapped=True))
    write_weights(transformer / HUB_WEIGHTS)
    name, scheduler = _scheduler(config)
    _write(folder / 'scheduler' / 'scheduler_config.json', {'_class_name': name, **scheduler})
    if vae:
        shutil.copytree(vae, folder / 'vae')
    index = {'transformer': _MODEL, 'scheduler': ['diffusers', name],
             'vae': ['diffusers', 'AutoencoderKL'] if vae else [None, None]}
    if text:
        index |= {'_class_name': 'PixArtSigmaPipeline',
                  **dict.fromkeys(('text_encoder', 'tokenizer'), [None, None])}
    else:
        latent = {name: config['latent'].get(name) for name in ('space', 'scale', 'shift')}
        index |= {'_class_name': [PIPELINE.removesuffix('.py'), 'LiTPipeline'],
                  'classes': config.get('classes'), 'latent': {**latent, 'null_class': has_null_class(arch)}}
        (folder / PIPELINE).write_text((PIECES / 'pipeline_twin.py').read_text())
    _write(folder / INDEX, index)


def _transformer(arch: Mapping) -> dict:
    (rows, columns), channels = arch['input_size'], arch['channels']
    return {'_class_name': _MODEL[1], 'arch': dict(arch), 'patch_size': arch['patch'],
            'in_channels': channels, 'out_channels': channels * (1 + arch['learn_sigma']),
            'sample_size': rows if rows == columns else [rows, columns],
            'num_embeds_ada_norm': arch.get('num_classes')}


def _scheduler(config: Mapping) -> tuple[str, dict]:
    """The scheduler of diffusers that takes the steps of the model's recorded sampler."""
    arch, steps = config['model'], config['diffusion']['steps']
    defaults = PROMPTS if conditioning(arch) == 'text' else CLASSES
    method = defaults.of_model(config).method
    betas = {'num_train_timesteps': steps, 'beta_start': 0.1 / steps, 'beta_end': 20 / steps,
             'beta_schedule': 'linear', 'prediction_type': 'epsilon', 'timestep_spacing': 'linspace'}
    if method == 'ddim':
        return 'DDIMScheduler', betas | {'clip_sample': False, 'set_alpha_to_one': True}
    if method == 'ddpm':
        variance = 'learned_range' if arch['learn_sigma'] else 'fixed_large'
        return 'DDPMScheduler', betas | {'clip_sample': False, 'variance_type': variance}
    return 'DPMSolverMultistepScheduler', betas | _SOLVER


def _write(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')
