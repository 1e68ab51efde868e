"""Folders of the Hugging Face hub: their config.json (read, and for PixArt written), names and checksums."""
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_jax.models.arch import mixers_of
from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.json_file import check_shape, read_json
from lit_jax.runtime.paths import file_sha256

PIXART_CLASS = 'PixArtTransformer2DModel'
# Transformer2DModel in older folders of both; '' in folders without the field.
_CLASSES = ('DiTTransformer2DModel', PIXART_CLASS, 'Transformer2DModel', '')
MOST = 10 ** 7       # of any number in a config.json
_WHOLE = ('num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'num_layers',
          'patch_size', 'sample_size', 'num_embeds_ada_norm', 'caption_channels', 'cross_attention_dim')


def check_hub_config(config: Mapping, where: str) -> None:
    """Raises UserError for a model that the converter does not read, or a field it cannot use."""
    check_shape(config, {**{f'{name}?': int for name in _WHOLE}, 'interpolation_scale?': float,
                         '_class_name?': str, 'use_additional_conditions?': bool}, where)
    for name in (*_WHOLE, 'interpolation_scale'):
        if config.get(name) is not None and not 0 < config[name] <= MOST:
            raise UserError(f'{where}: {name} must be a number above 0, at most {MOST}, got '
                            f'{shown(config[name])}')
    name = config.get('_class_name') or ''
    if name not in _CLASSES:
        raise UserError(f'{where} is the config of a {shown_name(name)}; this converter reads DiT '
                        f'(DiTTransformer2DModel) and PixArt-Σ ({PIXART_CLASS})')


def knows_class(config: Mapping) -> bool:
    """Whether a config.json says that it is of a diffusion model that the converter reads."""
    return config.get('_class_name') in _CLASSES[:3]


def refuse_flags(src, what: str, asked: Iterable[str]) -> None:
    """Raises UserError if flags were given that make sense for a diffusion model only."""
    if asked := ', '.join(asked):
        raise UserError(f'{src} is {what}, {asked} is for diffusion models; leave it out')


def read_hub_config(folder) -> dict:
    """config.json of a folder that may be from the hub; empty if there is none."""
    try:
        return read_json(Path(folder) / 'config.json', {str: object})
    except UserError:      # the reader of its weights says what is wrong with it
        return {}


def cached_id(folder: Path) -> str | None:
    """'owner/name' of a snapshot in the Hugging Face cache."""
    found = [re.fullmatch(r'models--(.+?)--(.+)', part) for part in folder.resolve().parts]
    return next((f'{match[1]}/{match[2]}' for match in reversed(found) if match), None)


def folder_id(folder: Path, part: str) -> str:
    """The id of a network from where it lies: its snapshot in the Hugging Face cache; the folder's name; for
    a part of a pipeline (PIPELINE/vae) the pipeline's name. part: a regular expression, 'vae'."""
    if cached := cached_id(folder):
        return cached
    parts = folder.resolve().parts
    return parts[-2] if re.fullmatch(part, parts[-1]) and len(parts) > 2 else parts[-1]


def pipeline_part(src, part: str) -> Path | None:
    """The folder of a pipeline's 'vae' or 'text_encoder'. src: the pipeline, PIPELINE/transformer, or a file
    in one of them. None where there is none."""
    folder = Path(src).resolve()
    folder = folder if folder.is_dir() else folder.parent
    pipeline = folder.parent if folder.name == 'transformer' else folder
    found = pipeline / part
    return found if (pipeline / 'transformer').is_dir() and read_hub_config(found) else None


def pipeline_vae(src) -> dict:
    """{'vae', 'scale', 'downscale'} of the VAE of a pipeline (see `pipeline_part`), or {}."""
    place = pipeline_part(src, 'vae')
    hub = read_hub_config(place) if place else {}
    scale, widths = hub.get('scaling_factor'), hub.get('block_out_channels')
    typed = isinstance(scale, float | int) and isinstance(widths, list)
    if place is None or hub.get('_class_name') != 'AutoencoderKL' or not typed:
        return {}
    return {'vae': folder_id(place, 'vae'), 'scale': float(scale), 'downscale': 2 ** (len(widths) - 1)}


def hub_digests(files: Iterable[Path]) -> dict:
    """sha256 of the weight file; of several, that of their names and sums as printed by `sha256sum`."""
    sums = {file.name: file_sha256(file) for file in files}
    if len(sums) == 1:
        return {'files': sums, 'sha256': next(iter(sums.values()))}
    text = ''.join(f'{digest}  {name}\n' for name, digest in sorted(sums.items()))
    return {'files': sums, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def hub_sizes(arch: Mapping) -> dict:
    """The fields of a diffusers config.json that tensors show as well."""
    sizes = {'num_layers': arch['depth'], 'patch_size': arch['patch'], 'in_channels': arch['channels']}
    if arch['family'] != 'pixart':
        return sizes | {'num_embeds_ada_norm': arch['num_classes'], 'sample_size': arch['input_size'][0]}
    return sizes | {'sample_size': arch['base_size'] * arch['patch'],
                    'caption_channels': arch['caption_channels'], 'cross_attention_dim': arch['width'],
                    'out_channels': arch['channels'] * (2 if arch['learn_sigma'] else 1)}


def is_hub_pixart(arch: Mapping) -> bool:
    """Whether diffusers has a class of its own for this model."""
    return not _oddities(arch)


def _oddities(arch: Mapping) -> list[str]:
    mixers = mixers_of(arch)
    return [text for holds, text in (
        (arch['family'] == 'pixart', f'its family is {arch["family"]}'),
        (all(mixer['name'] == 'softmax' for mixer in mixers), f'it has {mixers[-1]["name"]} attention'),
        (all(mixer.get('compress', 1) == 1 for mixer in mixers), 'its keys are compressed'),
        (all(mixer.get('qkv_bias', True) for mixer in mixers), 'its attention has no biases'),
        (arch.get('ffn', 'mlp') == 'mlp' and arch['mlp_ratio'] == 4, 'its ffn is not an mlp of ratio 4'),
        (arch.get('cross_heads') == mixers[0]['heads'], 'its cross-attention has heads of its own'))
            if not holds]


def pixart_hub_config(arch: Mapping, name: str) -> dict:
    """config.json with which diffusers builds this model, or a UserError if it cannot.

    diffusers takes base_size from sample_size; the network takes images of any other size on both sides."""
    if odd := _oddities(arch):
        raise UserError(f'{name} cannot be written for diffusers: its {PIXART_CLASS} has softmax attention '
                        f'only; here {odd[0]}. Leave --layout out: the original names fit every model')
    heads = arch['cross_heads']
    return {'_class_name': PIXART_CLASS, **hub_sizes(arch), 'num_attention_heads': heads,
            'attention_head_dim': arch['width'] // heads, 'interpolation_scale': arch['pe_interpolation'],
            'use_additional_conditions': False, 'attention_bias': True, 'activation_fn': 'gelu-approximate',
            'norm_type': 'ada_norm_single', 'norm_elementwise_affine': False, 'norm_eps': 1e-6,
            'num_embeds_ada_norm': 1000, 'norm_num_groups': 32, 'dropout': 0.0, 'upcast_attention': False,
            'attention_type': 'default'}
