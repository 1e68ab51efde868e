"""Writes a student as a pipeline folder of diffusers, with the code of its model in it.

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)

opens it: models of classes as `LiTPipeline` (lit_jax/convert/twins/pipeline_twin.py), text models as the
PixArtSigmaPipeline of diffusers with our transformer."""
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lit_jax.checkpoint.model_folder import CONFIG
from lit_jax.convert.torch_student import MODELING, PIECES, modeling_source, scheduler_source
from lit_jax.convert.vae_torch import is_hub_vae
from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.diffusion.settings import CLASSES, PROMPTS, SamplerSettings
from lit_jax.models.arch import conditioning
from lit_jax.models.facts import has_null_class
from lit_jax.runtime.errors import UserError

INDEX, PIPELINE = 'model_index.json', 'pipeline_lit.py'
HUB_WEIGHTS = 'diffusion_pytorch_model.safetensors'
PREFIX = 'model.'      # of the weights' names: the transformer wraps the model
_MODEL = [MODELING.removesuffix('.py'), 'LiTTransformer2DModel']
SCHEDULING, _SCHEDULER = 'scheduling_lit.py', 'LiTFlowScheduler'
UNSTEPPED = 'dopri5'      # each image has steps of its own, which a scheduler cannot take
_SOLVER = {'algorithm_type': 'dpmsolver++', 'solver_order': 2, 'solver_type': 'midpoint',
           'final_sigmas_type': 'zero', 'lower_order_final': True}


def check_pipeline(config: Mapping, vae) -> None:
    """UserError where the folder of the VAE is missing, wrong, or not wanted."""
    latents = config['latent']['space'] != 'pixels'
    if not latents and conditioning(config['model']) == 'text':
        raise UserError('text models are drawn by PixArtSigmaPipeline of diffusers, which needs a VAE, and '
                        'this one draws pixels; give --layout lit')
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
    diffusion = read_diffusion(config['diffusion'])
    _write(transformer / CONFIG, _transformer(arch, diffusion if isinstance(diffusion, Flow) else None))
    (transformer / MODELING).write_text(modeling_source(arch, wrapped=True))
    write_weights(transformer / HUB_WEIGHTS)
    name, scheduler = _scheduler(config)
    _write(folder / 'scheduler' / 'scheduler_config.json', {'_class_name': name, **scheduler})
    if name == _SCHEDULER:
        (folder / 'scheduler' / SCHEDULING).write_text(scheduler_source())
    if vae:
        shutil.copytree(vae, folder / 'vae')
    library = SCHEDULING.removesuffix('.py') if name == _SCHEDULER else 'diffusers'
    index = {'transformer': _MODEL, 'scheduler': [library, name],
             'vae': ['diffusers', 'AutoencoderKL'] if vae else [None, None]}
    if text:
        index |= {'_class_name': 'PixArtSigmaPipeline',
                  **dict.fromkeys(('text_encoder', 'tokenizer'), [None, None])}
    else:
        latent = {name: config['latent'].get(name) for name in ('space', 'scale', 'shift')}
        index |= {'_class_name': [PIPELINE.removesuffix('.py'), 'LiTPipeline'],
                  'classes': config.get('classes'), 'latent': {**latent, 'null_class': has_null_class(arch)},
                  'sampling': config.get('sampling')}
        (folder / PIPELINE).write_text((PIECES / 'pipeline_twin.py').read_text())
    _write(folder / INDEX, index)


def _transformer(arch: Mapping, flow: Flow | None) -> dict:
    (rows, columns), channels = arch['input_size'], arch['channels']
    return {'_class_name': _MODEL[1], 'arch': dict(arch), 'patch_size': arch['patch'],
            'in_channels': channels, 'out_channels': channels * (1 + (arch['learn_sigma'] and not flow)),
            'sample_size': rows if rows == columns else [rows, columns],
            'num_embeds_ada_norm': arch.get('num_classes'),
            'flow': flow and {'prediction': flow.prediction, 'noise_at': flow.noise_at}}


def _scheduler(config: Mapping) -> tuple[str, dict]:
    """The scheduler of diffusers that takes the steps of the model's recorded sampler, or our own."""
    arch, diffusion = config['model'], read_diffusion(config['diffusion'])
    settings = recorded_settings(config)
    if isinstance(diffusion, Flow):
        return _flow_scheduler(diffusion, settings, conditioning(arch) == 'text')
    steps, method = diffusion.steps, settings.method
    betas = {'num_train_timesteps': steps, 'beta_start': 0.1 / steps, 'beta_end': 20 / steps,
             'beta_schedule': 'linear', 'prediction_type': 'epsilon', 'timestep_spacing': 'linspace'}
    if method == 'ddim':
        return 'DDIMScheduler', betas | {'clip_sample': False, 'set_alpha_to_one': True}
    if method == 'ddpm':
        variance = 'learned_range' if arch['learn_sigma'] else 'fixed_large'
        return 'DDPMScheduler', betas | {'clip_sample': False, 'variance_type': variance}
    return 'DPMSolverMultistepScheduler', betas | _SOLVER


def recorded_settings(config: Mapping) -> SamplerSettings:
    """The sampler that a model records, or the usual one."""
    return (PROMPTS if conditioning(config['model']) == 'text' else CLASSES).of_model(config)


def _flow_scheduler(flow: Flow, settings: SamplerSettings, text: bool) -> tuple[str, dict]:
    """diffusers' own where they take the very same steps."""
    plain = flow.path == 'linear' and flow.prediction == 'velocity'
    if plain and settings.method == 'euler' and not text:      # LiTPipeline gives it the times
        return 'FlowMatchEulerDiscreteScheduler', {'num_train_timesteps': 1000, 'shift': settings.shift}
    if plain and settings.method == 'dpm++':
        return 'DPMSolverMultistepScheduler', {
            'num_train_timesteps': 1000, 'prediction_type': 'flow_prediction', 'use_flow_sigmas': True,
            'flow_shift': settings.shift, **_SOLVER}
    method = 'heun' if settings.method == UNSTEPPED else settings.method
    options = {name: getattr(settings, name)
               for name in ('shift', 'sde_form', 'sde_norm', 'last_step', 'last_size')}
    return _SCHEDULER, {'method': method, 'path': flow.path, 'prediction_type': flow.prediction, **options}


def _write(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')
