"""Recipes: the default, the table of model sizes, and `finalize`, the one place where a recipe is checked.

A recipe file in `configs/` calls `default()`, sets what differs and returns it. The command line can override
any field: `python train.py --config=configs/lit_xl.py --config.train.batch_size=32`."""
import functools
import inspect
import math
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ml_collections import ConfigDict

from lit_jax.diffusion.alignment import LOSSES
from lit_jax.diffusion.kinds import default_section
from lit_jax.diffusion.own_terms import import_losses
from lit_jax.diffusion.settings import CLASSES, PROMPTS
from lit_jax.models.arch import check_arch, check_partition, conditioning, mixers_of
from lit_jax.models.layers import REMAT_POLICIES
from lit_jax.models.mixers import import_mixer
from lit_jax.models.network import DTYPES
from lit_jax.recipes.fields import check_fields
from lit_jax.recipes.find import find_recipe
from lit_jax.recipes.hybrids import expand_stages, is_short
from lit_jax.runtime.errors import UserError, check_known, reason_of, shown
from lit_jax.runtime.own_modules import explained
from lit_jax.runtime.shipped import shipped_folder

# DiT's sizes (arXiv 2212.09748, table 1) with LiT's head counts (arXiv 2501.12976, supplement table 1).
SIZES = MappingProxyType({
    's': {'depth': 12, 'width': 384, 'softmax_heads': 6, 'linear_heads': 2},
    'b': {'depth': 12, 'width': 768, 'softmax_heads': 12, 'linear_heads': 3},
    'l': {'depth': 24, 'width': 1024, 'softmax_heads': 16, 'linear_heads': 4},
    'xl': {'depth': 28, 'width': 1152, 'softmax_heads': 16, 'linear_heads': 4},
})

OPTIMIZERS = ('adamw', 'came', 'muon')     # lit_jax/training/state.py
# How PixArt-Σ and LiT's text model are trained (arXiv 2501.12976 §4.2), for `text_to_image` and students.
TEXT_TRAINING = MappingProxyType({
    'train.optimizer': 'came', 'train.learning_rate': 2e-5, 'train.warmup_steps': 1_000,
    'train.clip_norm': 0.01, 'train.batch_size': 384, 'train.remat': 'full',
    'teacher.lambda_noise': 1.0, 'teacher.lambda_variance': 0.05, 'sample.count': 8})
# The latents of LightningDiT, normalised by their published mean and deviation.
VA_VAE = MappingProxyType({'vae': 'hustvl/vavae-imagenet256-f16d32-dinov2', 'scale': 1.0, 'downscale': 16,
                           'channels': 32})
MOST_FSDP = 128     # divides the width of every size; a weight in more shards is mostly latency


def softmax_mixer(heads: int) -> ConfigDict:
    """DiT's self-attention."""
    return ConfigDict({'name': 'softmax', 'heads': heads, 'qkv_bias': True})


def linear_mixer(heads: int) -> ConfigDict:
    """LiT's linear attention; `dwc_kernel` 0: no convolution, `focus_power` 3: the focused function."""
    return ConfigDict({'name': 'linear', 'heads': heads, 'qkv_bias': False, 'dwc_kernel': 5,
                       'activation': 'relu', 'focus_power': 0})


def default() -> ConfigDict:
    """DiT-S/2 on cached ImageNet latents with DiT's training settings; every recipe starts from this one."""
    size = SIZES['s']
    config = ConfigDict({
        'name': '',                      # written into the log and the workdir; a workdir keeps one recipe
        'seed': 0,
        'published': ConfigDict(),       # the paper's figures for this recipe (lit_jax/recipes/paper.py)
        'model': {
            'family': 'dit', 'depth': size['depth'], 'width': size['width'], 'patch': 2,
            'mlp_ratio': 4.0, 'learn_sigma': True, 'ffn': 'mlp',
            'mixer': softmax_mixer(size['softmax_heads']),
            'stages': (),                # runs of blocks with other mixers (lit_jax/models/dit.py)
        },
        'latent': {                      # what the network denoises
            'space': 'vae',              # 'vae' or 'pixels'
            'vae': 'stabilityai/sd-vae-ft-ema',
            'downscale': 8,              # image pixels per latent pixel, each way
            'channels': 4,
            'scale': 0.18215,            # x0 = scale · (latent or pixels); sd-vae scaling_factor
            'vae_path': os.environ.get('LIT_JAX_VAE', ''),      # to train from images and decode samples
        },
        'data': {
            'name': 'latents',           # latents, imagenet2012, folder, tfds:NAME, digits, mnist, synthetic
            'path': '',                  # its folder; '': below $LIT_JAX_DATA (lit_jax/data/sources.py)
            'flip': True,                # mirror half of the examples
            'strict': False,             # stop at a damaged image instead of skipping it
            'threads': 0,                # that read ahead; 0: one, for encoded images one per core
            'image_size': 256, 'num_classes': 1000,
            'classes': '',               # a subset: sub_imagenet, or a text file (lit_jax/data/subset.py)
            'buckets': False,            # keep about the aspect ratio of captioned images
        },
        'text': {                        # the captions of a text-to-image model
            'encoder': '',               # id of the text encoder; its folder, to train from raw captions:
            'encoder_path': os.environ.get('LIT_JAX_TEXT_ENCODER', ''),
            'channels': 4096, 'tokens': 300,     # of its features
            'long_ratio': 0.6,           # how often the longer of two captions is used
        },
        'diffusion': default_section(),  # kind: ddpm or flow, with its fields (docs/train/flows.md)
        'align': {                       # before training: each mixer learns its block of the teacher's
            'steps': 0,                  # attention (lit_jax/training/align.py); 0: off
            'loss': 'mse', 'delta': 1.0,     # mse, l1, huber with its delta
            'optimizer': 'adamw',        # as of train
            'learning_rate': 1e-3,       # falls to 0 by a cosine
            'clip_norm': 10.0,
        },
        'teacher': {                     # '' trains without a teacher
            'path': '',                  # model folder or workdir
            'lambda_noise': 0.5, 'lambda_variance': 0.05,      # λ1, λ2 of LiT §3.4
            'lambda_blocks': 0.0,        # of what each block returns (lit_jax/diffusion/alignment.py); 0: off
        },
        'inherit': {                     # '' starts from random weights
            'path': '',                  # model folder or workdir of the same width and depth
            'copy': '',                  # attention: 'q,k,v,o' or some of them (LiT table 3), or 'all'
        },
        'train': {
            'steps': 400_000,
            'batch_size': 256,           # global, over all devices and hosts
            'trainable': 'all',          # all, mixers, or patterns: 'blocks*/attn/*,final_layer/*'
            'lora_rank': 0,              # of low-rank updates on frozen projections of the blocks; 0: none
            'accumulate': 1,             # micro-batches per step
            'optimizer': 'adamw',        # adamw, came, muon
            'learning_rate': 1e-4, 'warmup_steps': 0,
            'cooldown_steps': 0,         # the last steps, in which the learning rate falls to 0
            'beta2': 0.999,              # of Adam, in adamw and muon
            'weight_decay': 0.0,
            'clip_norm': 0.0,            # 0 = no clipping
            'label_dropout': 0.1,
            'losses': (),                # terms of one's own: ('package.module:function', weight), ...
            'features': '',              # of a frozen network (lit_jax/training/frozen_features.py)
            'features_weight': 0.5,      # of REPA's loss, with model.projectors
            'balance_weight': 0.01,      # of MoH's load-balancing loss
            'ema_decay': 0.9999,
            'ema_warmup': False,         # decay min(ema_decay, (1 + step) / (10 + step)): for short runs
            'dtype': 'bfloat16',         # compute; parameters, optimizer and losses are float32
            'float32_gradients': False,  # of kernels, also where devices add theirs up
            'scan_layers': True,
            'remat': 'none',             # none, full, dots, dots_no_batch
        },
        'mesh': {                        # devices along each axis; -1: the rest (docs/run/clusters.md)
            'data': -1,                  # copies of the weights
            'fsdp': 1,                   # shards weights and optimizer; -1 with data -1: as the width allows
            'tensor': 1,                 # shards heads and hidden widths
            'seq': 1,                    # shards rows of tokens, for high resolution
        },
        'log': {
            'every': 100, 'tensorboard': False, 'wandb': False,
            'wandb_project': 'lit_jax', 'wandb_name': '',      # '': the workdir's
            'peak_tflops': 0.0,          # bfloat16 peak of one device, for the MFU; 0: by its name
        },
        'checkpoint': {'every': 5_000, 'keep_latest': 3, 'keep_every': 50_000},
        'eval': {                        # scores of EMA samples while training (docs/evaluate/evaluation.md)
            'every': 0,                  # steps, 0: off; best a multiple of checkpoint.every
            'num_samples': 10_000,
            'full_every': 0,             # the same with full_num_samples; 0: never
            'full_num_samples': 50_000,
            'metrics': 'fid,is',
            'best': 'fid',               # the score whose best weights are kept in WORKDIR/best
            'reference': '',             # ADM's .npz, or one of `python evaluate.py reference`
            'features': 'inception',     # or 'digits', for the digits
            'inception': '',             # path of the Inception weights
            'steps': CLASSES.steps, 'method': CLASSES.method, 'cfg_scales': (1.0,),
            'cfg_channels': CLASSES.cfg_channels, 'labels': 'random',
            'batch_size': 0,             # max images in flight per host; 0: two groups of 16 per device
        },
        'sample': {                      # grids drawn while training
            'every': 10_000, 'count': 16,
            'steps': CLASSES.steps, 'method': CLASSES.method, 'cfg_scale': CLASSES.cfg_scale,
        },
    })
    return config.lock()


def models_folder(name: str) -> str:
    """Where recipes look for a model folder: $LIT_JAX_MODELS/name, else models/name."""
    return f'{os.environ.get("LIT_JAX_MODELS", "models").rstrip("/")}/{name}'


def load_recipe(name: str | Path) -> ConfigDict:
    """The recipe that `--config=NAME` gives: 'lit_xl', 'baselines:dig_xl', a file of one's own, which may
    import modules that lie beside it, and name mixers of them.

    UserError for an unknown name or row, and for a file that does not run."""
    path, colon, row = find_recipe(str(name)).partition(':')
    beside = Path(path).resolve().parent
    if str(beside) not in sys.path and shipped_folder('configs') not in (beside, *beside.parents):
        sys.path.append(str(beside))
    with explained(functools.partial(_problem_of_file, path)):
        get_config = runpy.run_path(path).get('get_config')
        if get_config is None:
            raise UserError(f'{path} is no recipe: it has no function get_config')
        takes = inspect.signature(get_config).parameters
        if colon and not takes:
            raise UserError(f'{name}: this recipe has no rows; give {path}')
        if not colon and any(one.default is one.empty for one in takes.values()):
            raise UserError(f'{name}: this recipe has rows; give one after the file, as in {path}:ROW')
        config = get_config(row) if colon else get_config()
        if not isinstance(config, ConfigDict):
            raise UserError(f'{path}: get_config must return a recipe, such as recipes.default()')
        return config


def _problem_of_file(path: str, error: BaseException) -> str:
    """An error in a recipe's file, told by its line."""
    lines = [entry.lineno for entry in traceback.extract_tb(error.__traceback__) if entry.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f'the recipe {path}{f", line {line}" if line else ""} does not run: {reason_of(error)}'


def size(config: ConfigDict, name: str, mixer: str) -> ConfigDict:
    """Sets depth, width and mixer ('softmax', 'linear') of a row of SIZES, large ones sharded over `fsdp`."""
    row = SIZES[name]
    config.model.depth, config.model.width = row['depth'], row['width']
    make = {'softmax': softmax_mixer, 'linear': linear_mixer}[mixer]
    config.model.mixer = make(row[f'{mixer}_heads'])
    if row['width'] >= 1024:      # weights, EMA and moments would fill a 16 GB chip
        config.mesh.fsdp = -1
    return config


def flow(config: ConfigDict, **fields) -> ConfigDict:
    """SiT's objective and samplers (arXiv 2401.08740), with further fields of `diffusion`: flow(config,
    noise_at=1) is REPA's. 250 steps of the SDE for scores, as for published ones."""
    config.diffusion.update({'kind': 'flow', **fields})
    config.sample.update({'method': 'heun', 'steps': 25})
    config.eval.update({'method': 'sde', 'steps': 250})
    return config


def lightningdit(config: ConfigDict, mixer: str) -> ConfigDict:
    """LightningDiT-XL/1 ('softmax') or a linear student of it ('linear') on latents of VA-VAE, with its
    training settings of 64 epochs (arXiv 2501.01423). Both turn queries and keys by their positions."""
    flow(config, times='logit_normal', cosine=1.0)
    size(config, 'xl', mixer)
    config.unlock()
    config.model.update({'patch': 1, 'learn_sigma': False, 'ffn': 'swiglu_bias', 'norm': 'rms'})
    config.model.mixer.rope = True
    config.lock()
    config.latent.update(VA_VAE)
    config.train.update({'steps': 80_000, 'batch_size': 1024, 'learning_rate': 2e-4, 'beta2': 0.95})
    config.sample.update({'method': 'euler', 'steps': 50})
    config.eval.update({'method': 'euler'})
    return config


def text_to_image(config: ConfigDict, image_size: int, mixer: str) -> ConfigDict:
    """PixArt-Σ ('softmax') or LiT-0.6B ('linear', arXiv 2501.12976 §4.2) at a size, with LiT's training
    settings.

    The paper gives λ1, λ2, learning rate, batch size and the share of long captions; optimizer, warm-up and
    clipping are those of PixArt-Σ's own recipe with the same learning rate and batch size."""
    make = {'softmax': lambda: softmax_mixer(16), 'linear': lambda: linear_mixer(2)}[mixer]
    config.model = ConfigDict({'family': 'pixart', 'depth': 28, 'width': 1152, 'patch': 2, 'mlp_ratio': 4.0,
                               'learn_sigma': True, 'ffn': 'mlp', 'mixer': make(), 'stages': (),
                               'cross_heads': 16, 'pe_interpolation': image_size / 512})
    config.latent.update({'vae': 'stabilityai/sdxl-vae', 'scale': 0.13025})
    config.data.update({'name': 'caption_latents', 'image_size': image_size, 'flip': False})
    config.text.encoder = 'PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers'
    config.sample.update({'method': PROMPTS.method, 'steps': PROMPTS.steps, 'cfg_scale': PROMPTS.cfg_scale})
    config.update_from_flattened_dict(dict(TEXT_TRAINING))
    config.mesh.fsdp = -1
    return config


def mixer(name: str, **options) -> ConfigDict:
    """A mixer with its defaults, for `config.model.mixer`: mixer('dydila', heads=1, powers=0)."""
    return ConfigDict({'name': name, **import_mixer(name).defaults(), **options})


def digits(config: ConfigDict) -> ConfigDict:
    """Settings shared by the digits recipes: data, pixel space, a small run. Mixers are set apart."""
    config.data.name, config.data.image_size, config.data.num_classes = 'digits', 8, 10
    config.data.flip = False                 # a mirrored 2 is no 2
    config.latent.update({'space': 'pixels', 'vae': '', 'downscale': 1, 'channels': 1})
    config.latent.scale = 2.0     # at unit size, DiT's linear schedule hides 8x8 pixels too early
    config.model.update({'depth': 4, 'width': 64, 'patch': 2})
    config.train.update({'batch_size': 64, 'learning_rate': 2e-3, 'ema_decay': 0.999, 'ema_warmup': True,
                         'dtype': 'float32'})
    config.train.scan_layers = False         # unrolled blocks run faster on CPU
    config.sample.update({'count': 40, 'cfg_scale': 2.0})
    config.log.every = 50
    return config


def mnist(config: ConfigDict) -> ConfigDict:
    """Settings shared by the MNIST recipes: data, pixel space, a small run. Mixers are set apart."""
    config.data.name, config.data.image_size, config.data.num_classes = 'mnist', 28, 10
    config.data.flip = False                 # a mirrored 2 is no 2
    config.latent.update({'space': 'pixels', 'vae': '', 'downscale': 1, 'channels': 1})
    config.latent.scale = 2.0     # as of the smaller digits
    config.model.update({'depth': 4, 'width': 96, 'patch': 4})
    config.train.update({'batch_size': 64, 'optimizer': 'muon', 'learning_rate': 2e-3, 'ema_decay': 0.999,
                         'ema_warmup': True, 'dtype': 'float32'})
    config.train.scan_layers = False         # unrolled blocks run faster on CPU
    config.sample.update({'count': 40, 'cfg_scale': 1.5, 'every': 0})
    return config


def mnist_flow(config: ConfigDict) -> ConfigDict:
    """Makes a flow of an MNIST recipe: as many evaluations in a sample as the other digits have."""
    flow(config, times='logit_normal')
    config.model.learn_sigma = False
    config.sample.method = 'euler'
    return config


def is_text(config: ConfigDict) -> bool:
    """Whether the recipe's model draws from captions."""
    return conditioning(config.model) == 'text'


def shapes(config: ConfigDict) -> ConfigDict:
    """Settings shared by the recipes of rendered shapes: captions, pixels, a small run. Mixers are apart."""
    config.data.update({'name': 'shapes', 'image_size': 18, 'flip': False})
    config.text.update({'encoder': 'lit_jax/shapes_t5', 'encoder_path': models_folder('shapes_t5'),
                        'channels': 64, 'tokens': 12})
    config.text.long_ratio = 0.4             # prompts are worded like the short captions
    config.latent.update({'space': 'pixels', 'vae': '', 'downscale': 1, 'channels': 3})
    config.latent.scale = 2.0                # shapes must show above the noise
    config.model = ConfigDict({'family': 'pixart', 'depth': 4, 'width': 128, 'patch': 3, 'mlp_ratio': 4.0,
                               'learn_sigma': True, 'ffn': 'mlp', 'mixer': softmax_mixer(8), 'stages': (),
                               'cross_heads': 8, 'pe_interpolation': 6 / 32})    # coordinates 0..32
    config.train.update({'batch_size': 32, 'learning_rate': 8e-4, 'clip_norm': 0.1, 'ema_decay': 0.998,
                         'ema_warmup': True, 'dtype': 'float32'})
    config.train.scan_layers = False         # unrolled blocks run faster on CPU
    config.sample.update({'count': 16, 'cfg_scale': 1.5, 'method': 'dpm++', 'steps': 20, 'every': 0})
    return config


def architecture(config: ConfigDict) -> dict:
    """The architecture of a recipe (see `lit_jax.models.network.Network`), checked."""
    _check_sizes(config)
    image_size, down, patch = config.data.image_size, config.latent.downscale, config.model.patch
    unit = down * patch
    if image_size % unit:
        nearest = max(unit, round(image_size / unit) * unit)
        raise UserError(f'data.image_size {image_size} is not divisible by latent.downscale · model.patch = '
                        f'{down} · {patch} = {unit}; the nearest size that is: {nearest}')
    arch = config.model.to_dict()
    if is_short(arch.get('stages', ())):
        arch['stages'] = expand_stages(arch['stages'], arch['depth'], _dit_mixer(arch))
    arch |= {'input_size': (image_size // down,) * 2, 'channels': config.latent.channels}
    if is_text(config):
        arch |= {'base_size': image_size // unit, 'caption_channels': config.text.channels,
                 'caption_tokens': config.text.tokens}
    else:
        arch['num_classes'] = config.data.num_classes
    for mixer in mixers_of(arch):
        import_mixer(mixer.get('name'))
    return check_arch(arch)


def _check_sizes(config: ConfigDict) -> None:
    if isinstance(config.get('model'), ConfigDict) and config.model.get('depth', 0) is None:
        raise UserError('this recipe takes its sizes from a teacher: give --config.teacher.path=FOLDER '
                        '(lit_jax.training.from_teacher.complete reads it)')


def _dit_mixer(arch: Mapping) -> dict:
    """Softmax attention with the heads of DiT at this width: what a hybrid without a teacher keeps."""
    known = {row['width']: row['softmax_heads'] for row in SIZES.values()}
    heads = arch.get('cross_heads') or known.get(arch['width']) or max(1, arch['width'] // 64)
    return softmax_mixer(heads).to_dict()


def finalize(config: ConfigDict, device_count: int) -> ConfigDict:
    """Checks a recipe against itself and the devices (UserError), resolves mesh sizes of -1, and locks it."""
    if isinstance(config, ConfigDict):
        _check_sizes(config)
    check_fields(config, default())
    config = config.copy_and_resolve_references()
    arch = architecture(config)
    train = config.train
    check_known('train.dtype', train.dtype, DTYPES)
    check_known('train.remat', train.remat, REMAT_POLICIES)
    check_known('train.optimizer', train.optimizer, OPTIMIZERS)
    import_losses(train.losses)
    check_known('align.loss', config.align.loss, LOSSES)
    check_known('align.optimizer', config.align.optimizer, OPTIMIZERS)
    if train.lora_rank and train.trainable == 'all':
        raise UserError(f'train.lora_rank {train.lora_rank} is for projections that are frozen, and '
                        f'train.trainable=all freezes none: --config.train.trainable=mixers, or '
                        f'train.lora_rank=0')
    if train.cooldown_steps and not 0 < train.cooldown_steps <= train.steps - train.warmup_steps:
        raise UserError(f'train.cooldown_steps {train.cooldown_steps} must be 0, or fit into the '
                        f'{train.steps} steps of the run beside {train.warmup_steps} of warm-up')
    config.mesh.update(_resolve_mesh(config.mesh.to_dict(), device_count, arch['width']))
    check_partition(arch, config.mesh.to_dict())
    if train.float32_gradients and config.mesh.tensor * config.mesh.seq > 1:
        raise UserError(f'train.float32_gradients goes with data and fsdp; the mesh has tensor '
                        f'{config.mesh.tensor} and seq {config.mesh.seq}: set them to 1, or '
                        f'float32_gradients to False')
    unit, batch = config.mesh.data * config.mesh.fsdp * train.accumulate, train.batch_size
    if batch % unit:
        nearest = max(unit, round(batch / unit) * unit)
        raise UserError(f'train.batch_size {batch} is not divisible by data · fsdp · accumulate = '
                        f'{config.mesh.data} · {config.mesh.fsdp} · {train.accumulate} = {unit}; the nearest '
                        f'that is: {nearest}')
    if is_text(config):
        _check_text(config)
    _check_sampling(config)
    return config.lock()


def _check_text(config: ConfigDict) -> None:
    data = config.data
    if data.flip:
        raise UserError('data.flip would swap left and right in images but not in captions; set it to False')
    if config.eval.every or config.eval.full_every:
        raise UserError('eval scores class-conditional models while they train; score a text-to-image model '
                        'with sample.py and evaluate.py geneval, and set eval.every and eval.full_every to 0')


def _check_sampling(config: ConfigDict) -> None:
    """Grids are first drawn long after the start, so their settings are checked now."""
    CLASSES.updated(config.sample).check(config.diffusion)
    _check_guided(config, 'sample.cfg_scale', [config.sample.cfg_scale] * (config.sample.every > 0))
    evaluation = config.eval
    if not evaluation.every and not evaluation.full_every:
        return
    if not evaluation.cfg_scales:
        raise UserError('eval.cfg_scales is empty; give one or more guidance scales, such as (1.0, 1.5)')
    metrics = [name.strip() for name in evaluation.metrics.split(',')]
    if evaluation.best and evaluation.best not in metrics:
        raise UserError(f'eval.best {shown(evaluation.best)} is not among eval.metrics '
                        f'{shown(evaluation.metrics)}')
    for scale in evaluation.cfg_scales:
        CLASSES.updated(evaluation, cfg_scale=scale).check(config.diffusion)
    _check_guided(config, 'eval.cfg_scales', evaluation.cfg_scales)


def _check_guided(config: ConfigDict, field: str, scales) -> None:
    """Nothing is guided by a class that the run never trains."""
    if config.train.label_dropout == 0 and not is_text(config) and any(scale != 1 for scale in scales):
        raise UserError(f'train.label_dropout is 0, so the null class is never trained, and {field} guides '
                        f'by it: set {field} to 1, or train.label_dropout to 0.1')


def _resolve_mesh(mesh: dict[str, int], device_count: int, width: int) -> dict[str, int]:
    """Fills in sizes of -1; the product of all axes must be the number of devices.

    One axis may be -1, or `data` and `fsdp` together: then fsdp takes the largest part of the remaining
    devices that divides the width (up to MOST_FSDP), and data the rest."""
    free = {axis for axis, n in mesh.items() if n == -1}
    if any(n < 1 and n != -1 for n in mesh.values()) or (len(free) > 1 and free != {'data', 'fsdp'}):
        raise UserError(f'mesh sizes must be positive; one may be -1, or data and fsdp together; got {mesh}')
    fixed = math.prod(n for n in mesh.values() if n > 0)
    if device_count % fixed or (not free and fixed != device_count):
        raise UserError(f'the mesh {mesh} needs {"a multiple of " if free else ""}{fixed} devices, here are '
                        f'{device_count}; change config.mesh so that its product is {device_count}')
    left, resolved = device_count // fixed, dict(mesh)
    if free == {'data', 'fsdp'}:
        resolved['fsdp'] = math.gcd(left, width)
        while resolved['fsdp'] > MOST_FSDP and resolved['fsdp'] % 2 == 0:
            resolved['fsdp'] //= 2
        resolved['data'] = left // resolved['fsdp']
    elif free:
        resolved[free.pop()] = left
    return resolved
