"""What every field of a recipe may be: one table of the ranges of its numbers, and the kinds of the rest."""
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from lit_jax.models.arch import RANGES as ARCH_RANGES
from lit_jax.runtime.errors import UserError, listed, shown
from lit_jax.runtime.ranges import Range, check_ranges, share, weight

_SIDE = Range(1, 65_536)
_CHANNELS = Range(1, 65_536)
_COUNT, _OFTEN = Range(1), Range(0)      # at least one; 0: never
_GUIDANCE = Range(-1000, 1000, whole=False)
_AXIS = Range(1, 1_048_576, also=(-1,))

RANGES: dict[str, Range] = {
    'seed': Range(0, 2 ** 32 - 1),
    **{f'model.{name}': own for name, own in ARCH_RANGES.items()},
    'latent.downscale': Range(1, 1024), 'latent.channels': _CHANNELS,
    'latent.scale': Range(0, 1e6, whole=False, above=True),
    'data.threads': Range(0, 65_536), 'data.image_size': _SIDE, 'data.num_classes': Range(1, 2 ** 24),
    'text.channels': _CHANNELS, 'text.tokens': _SIDE, 'text.long_ratio': share(),
    'diffusion.steps': Range(1, 1_000_000), 'diffusion.noise_at': Range(0, 1),
    'diffusion.time_std': Range(0, 1000, whole=False, above=True), 'diffusion.cosine': weight(1000),
    'diffusion.time_shift': Range(0, 1000, whole=False, above=True),
    'align.steps': _OFTEN, 'align.delta': Range(0, 1e6, whole=False, above=True),
    'align.learning_rate': Range(0, 1000, whole=False, above=True), 'align.clip_norm': weight(1e9),
    'teacher.lambda_noise': weight(), 'teacher.lambda_variance': weight(), 'teacher.lambda_blocks': weight(),
    'train.steps': _COUNT, 'train.batch_size': Range(1, 2 ** 24), 'train.accumulate': Range(1, 2 ** 24),
    'train.learning_rate': Range(0, 1000, whole=False, above=True),
    'train.warmup_steps': _OFTEN, 'train.cooldown_steps': _OFTEN, 'train.lora_rank': Range(0, 65_536),
    'train.weight_decay': weight(1000), 'train.clip_norm': weight(1e9), 'train.beta2': share(below=True),
    'train.label_dropout': share(below=True), 'train.ema_decay': share(below=True),
    'train.balance_weight': weight(), 'train.features_weight': weight(),
    'mesh.data': _AXIS, 'mesh.fsdp': _AXIS, 'mesh.tensor': _AXIS, 'mesh.seq': _AXIS,
    'log.every': _COUNT, 'log.peak_tflops': weight(),
    'checkpoint.every': _COUNT, 'checkpoint.keep_latest': _COUNT, 'checkpoint.keep_every': _OFTEN,
    'eval.every': _OFTEN, 'eval.full_every': _OFTEN, 'eval.num_samples': Range(2),
    'eval.full_num_samples': Range(2), 'eval.steps': _COUNT, 'eval.cfg_scales[]': _GUIDANCE,
    'eval.cfg_channels': Range(1, 65_536, also=('all',)), 'eval.batch_size': _OFTEN,
    'sample.every': _OFTEN, 'sample.count': Range(1, 65_536), 'sample.steps': _COUNT,
    'sample.cfg_scale': _GUIDANCE,
    # Of train_vae.py:
    'vae.widths[]': _CHANNELS, 'vae.layers': Range(1, 64), 'vae.groups': _CHANNELS, 'vae.channels': _CHANNELS,
    'train.kl_weight': weight(), 'train.log_every': _COUNT, 'train.save_every': _COUNT,
    'train.window': Range(0, 65_536),
}
# Sections whose further fields depend on the family of the model, or on the paper.
_FREE = {'model': ('family', 'depth', 'width', 'patch', 'mixer'), 'model.mixer': ('name',),
         'published': ()}
_KINDS = {bool: 'true or false', str: 'a text', tuple: 'a list'}


def check_fields(config: ConfigDict, usual: ConfigDict) -> None:
    """Raises UserError for fields that a recipe lacks, of the wrong kind, and for numbers out of range.

    usual: the default recipe, which has every field."""
    if not isinstance(config, ConfigDict):
        raise UserError(f'a recipe starts from recipes.default(), got {shown(config)}')
    if wrong := list(_wrong_fields(config, usual)):
        raise UserError('the recipe cannot be used:' + listed(wrong))
    check_ranges(config.to_dict(), RANGES)


def _wrong_fields(config: ConfigDict, usual: Mapping, section: str = '') -> Iterator[str]:
    for name, example in usual.items():
        full = f'{section}{name}'
        if name not in config:
            yield f'it lacks {full}'
        elif isinstance(example, ConfigDict):
            if not isinstance(config[name], ConfigDict):
                yield f'{full} must be a section with fields, got {shown(config[name])}'
            else:
                needed = _FREE.get(full, tuple(example))
                yield from _wrong_fields(config[name], {key: example[key] for key in needed}, f'{full}.')
        elif full not in RANGES and not isinstance(config[name], list | tuple if isinstance(example, tuple)
                                                   else type(example)):
            yield f'{full} must be {_KINDS[type(example)]}, got {shown(config[name])}'
