"""PixArt's part of a PyTorch file: captions, their attention heads, and the training resolution.

No tensor shows the resolution: positions are computed, and a stored `pos_embed` is ignored, as in the
official loader. It comes from config.json of a diffusers folder, from the caller, or from the file's name."""
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_jax.convert.torch_files import Source
from lit_jax.convert.torch_survey import Found, Hints
from lit_jax.recipes.recipe import SIZES
from lit_jax.runtime.errors import shown

NULL_CAPTION_KEY = 'y_embedder.y_embedding'     # a buffer of the original; diffusers does not keep it
TOKENS = 300                                    # of PixArt-Σ; diffusers' files do not show them
ALPHA_TOKENS = 120                              # of PixArt-α
EXTENT = 32      # positions are 0..32 at every resolution: pe_interpolation = base_size/32
_FILE_NAME = re.compile(r'pixart.*[-_](256|512|1024|2048|2k)(?![0-9])', re.IGNORECASE)
# Fields of a diffusers config.json that must have these values if given: this model has no others.
_FIXED = {'norm_eps': 1e-6, 'activation_fn': 'gelu-approximate', 'norm_type': 'ada_norm_single',
          'norm_elementwise_affine': False}


@dataclass
class Captioned:
    """A text model's fields of the architecture beside DiT's, and what to report about them."""
    fields: dict
    unknown: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def infer_captions(source: Source, found: Found, hints: Hints, hub: Mapping, mixer: Mapping) -> Captioned:
    """cross_heads, caption_channels, caption_tokens, input_size, base_size and pe_interpolation."""
    result = Captioned({'caption_channels': found.sizes['Y'], 'caption_tokens': found.sizes.get('L', TOKENS)})
    _set_cross_heads(result, found, hints, hub, mixer)
    _set_resolution(result, source, found, hints, hub)
    if result.fields['caption_tokens'] == ALPHA_TOKENS:
        result.notes.append('120 caption tokens: PixArt-α, whose latents are Stable Diffusion\'s: give '
                            '--vae stabilityai/sd-vae-ft-ema --latent_scale 0.18215 if it is one')
    return result


def _set_cross_heads(result: Captioned, found: Found, hints: Hints, hub: Mapping, mixer: Mapping) -> None:
    """Softmax attention has as many heads for itself as for the caption; linear attention its own."""
    width = found.sizes['D']
    known = {(row['depth'], row['width']): row['softmax_heads'] for row in SIZES.values()}
    own = mixer['heads'] if mixer['name'] == 'softmax' else None
    heads = hints.cross_heads or hub.get('num_attention_heads') or own or known.get((found.depth, width))
    result.fields['cross_heads'] = heads
    if heads is None and mixer['name'] != 'softmax':
        result.problems.append('the file does not show the heads of the cross-attention, and depth '
                               f'{found.depth} with width {width} is no published size; give --cross_heads N')
    elif heads is not None and (heads < 1 or width % heads):
        result.problems.append(f'{heads} heads of the cross-attention do not divide the width {width}; give '
                               f'another --cross_heads N')
    if result.problems or heads is None:
        result.unknown.add('cross_heads')
        result.fields['cross_heads'] = 1


def _set_resolution(result: Captioned, source: Source, found: Found, hints: Hints, hub: Mapping) -> None:
    patch, pe_interpolation = found.sizes['p'], None
    if side := hub.get('sample_size'):
        size = (side, side)
        pe_interpolation = hub.get('interpolation_scale') or max(side // 64, 1)  # diffusers' rule for null
    elif hints.input_size:
        size = tuple(hints.input_size)
    elif named := next(filter(None, map(_FILE_NAME.search, (path.name for path in source.files))), None):
        image = 2048 if named[1].lower() == '2k' else int(named[1])
        size = (image // 8,) * 2           # the latents of SDXL's VAE
        result.notes.append(f'{image}x{image} pixels, by the name of the file; --image_size N changes it')
    else:
        size = (patch, patch)
        result.unknown.add('input_size')
        result.problems.append('nothing in the file shows the resolution that it was trained for; give '
                               '--image_size N: 256, 512, 1024 or 2048 for the published models')
    base = max(1, math.isqrt(size[0] * size[1]) // patch)
    pe_interpolation = pe_interpolation or base / EXTENT
    result.fields |= {'input_size': size, 'base_size': base, 'pe_interpolation': pe_interpolation}


def caption_hub_problems(arch: Mapping, hub: Mapping) -> list[str]:
    """What a diffusers config.json asks for, beside sizes, that this model does not have."""
    problems = [f'config.json says {name} {shown(hub[name])}, this converter reads models with {value}'
                for name, value in _FIXED.items() if hub.get(name) not in (None, value)]
    conditions = hub.get('use_additional_conditions')
    if conditions or conditions is None and hub.get('sample_size') == 128:
        problems.append('config.json asks for micro conditions (use_additional_conditions, the default at '
                        'sample_size 128): that is PixArt-α at 1024 pixels, this converter reads PixArt-Σ')
    own = arch['mixer']['heads'] if arch['mixer']['name'] == 'softmax' else arch['cross_heads']
    if own != arch['cross_heads']:
        problems.append(f'diffusers has as many heads for both, not {arch["cross_heads"]} and {own}')
    return problems


def has_null_caption(source: Source) -> bool:
    """Whether the file holds the features of the empty caption."""
    return NULL_CAPTION_KEY in source.tensors


def text_section(arch: Mapping, given: Mapping | None) -> dict:
    """config['text'] of a model folder. given: the section stored in an export of ours."""
    section = {'encoder': None, 'channels': arch['caption_channels'], 'tokens': arch['caption_tokens']}
    return section | dict(given or {})
