"""Parses and checks prompts, seeds and sizes before anything is loaded."""
import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name
from lit_jax.runtime.paths import as_path
from lit_jax.sampling.noise import check_seed
from lit_jax.text.tokenizer import UNKNOWN, Tokens

LOG = logging.getLogger('lit_jax')
LARGEST_GROUP = 8
GROUP_PIXELS = 2048          # latent pixels that are computed together, about: enough to keep a device busy


def collect_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the command line, then of a file; an empty one draws without text. UserError for none."""
    prompts = [*given, *(read_prompts(file) if file else ())]
    if not prompts:
        raise UserError('no prompt is given: say what to draw with --prompt="..." (several times for '
                        'several), or --prompts=FILE, one a line')
    for prompt in prompts:
        check_text('--prompt', prompt)
    if empty := [number for number, prompt in enumerate(prompts) if not prompt.strip()]:
        LOG.warning('prompt %s is empty: it draws without text', ', '.join(map(str, empty[:8])))
    return prompts


def check_text(flag: str, text: str) -> None:
    """Raises UserError for bytes of the command line that are not UTF-8: no list of images could
    hold them."""
    if any('\ud800' <= character <= '\udfff' for character in text):
        raise UserError(f'{flag} {shown(text)} is not UTF-8: give the text in UTF-8')


def read_prompts(path) -> list[str]:
    """The prompts in a UTF-8 file, one a line; blank lines are skipped with a warning. UserError for none."""
    try:
        text = as_path(path).read_bytes().decode('utf-8-sig')
    except FileNotFoundError:
        raise UserError(f'--prompts {path}: there is no such file') from None
    except OSError as error:
        raise UserError(f'--prompts {path} cannot be read: {reason_of(error)}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'--prompts {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text, one '
                        f'prompt a line') from error
    lines = [line.strip() for line in re.split(r'\r\n|\r|\n', text)]
    prompts = [line for line in lines if line]
    blank = len(lines) - len(prompts) - (lines[-1] == '')      # after the last line break there is no line
    if not prompts:
        raise UserError(f'--prompts {path} holds no prompt: write one a line')
    if blank > 0:
        LOG.warning('%s: %d blank lines are skipped', path, blank)
    return prompts


def parse_seeds(seed: int | None, seeds: str | None, default: Sequence[int] = (0,)) -> list[int]:
    """--seed and --seeds=0,1,2 (one of the two) as a list without repetitions."""
    if seed is not None and seeds is not None:
        raise UserError(f'give one of --seed {seed} and --seeds {seeds}')
    if seeds is None:
        found = list(default) if seed is None else [seed]
    else:
        try:
            found = [int(part) for part in seeds.split(',')]
        except ValueError:
            raise UserError(f'--seeds {shown(seeds)}: whole numbers with commas between them are expected, '
                            f'as '
                            f'0,1,2') from None
    for one in found:
        check_seed(one)
    if len(set(found)) < len(found):
        raise UserError(f'--seeds {seeds}: the same seed twice draws the same image twice')
    return found


def parse_size(text: str) -> tuple[int, int]:
    """'1024x768' (width x height) or '1024' as (height, width) in pixels."""
    match = re.fullmatch(r'\s*(\d+)\s*(?:[xX×*]\s*(\d+)\s*)?', text)
    if not match:
        raise UserError(f'--size {shown(text)}: expected WIDTHxHEIGHT in pixels, as 1024x768, or one '
                        f'number for a '
                        f'square')
    width = int(match[1])
    return int(match[2] or width), width


def latent_size(size: tuple[int, int] | None, arch: Mapping, downscale: int) -> tuple[int, int]:
    """(H, W) of what the model draws for images of `size` (height, width); None: its own size.
    Raises UserError with the nearest possible size unless both sides are multiples of downscale · patch."""
    if size is None:
        return tuple(arch['input_size'])
    unit = downscale * arch['patch']
    if any(side % unit or side < unit for side in size):
        height, width = (max(unit, (2 * side + unit) // (2 * unit) * unit) for side in size)
        shrinks = f'its VAE shrinks by {downscale}, ' if downscale > 1 else ''
        raise UserError(f'--size {size[1]}x{size[0]}: both sides must be multiples of {unit} for this model '
                        f'({shrinks}its patches are {arch["patch"]} wide); the nearest size is '
                        f'{width}x{height}')
    return size[0] // downscale, size[1] // downscale


def default_group(size: tuple[int, int]) -> int:
    """Images computed together by default: as many as fill a device; one for 32 x 64 latents and larger."""
    return int(np.clip(GROUP_PIXELS // (size[0] * size[1]), 1, LARGEST_GROUP))


def say_unknown(prompts: Sequence[str], tokens: Tokens) -> None:
    """Warns of prompts with tokens that the tokenizer does not know: emoji, other scripts."""
    unknown_P = ((tokens.ids == UNKNOWN) & (tokens.mask > 0)).sum(-1)
    for row in np.flatnonzero(unknown_P)[:8]:
        LOG.warning('%d of %d tokens of "%s" are not in the tokenizer\'s vocabulary and are ignored',
                    unknown_P[row], tokens.mask[row].sum() - 1, shown_name(prompts[row][:60]))
    if (unknown_P > 0).sum() > 8:
        LOG.warning('and so in %d more prompts', (unknown_P > 0).sum() - 8)


def check_text_encoder(encoder: Mapping, config: Mapping, path, source) -> None:
    """Raises one UserError that lists how a text encoder's config differs from what a model's needs."""
    known = (config.get('text') or {}).get('encoder')
    check_alike({'width': encoder['text_encoder']['width'], 'id': encoder['id']},
                {'width': config['model']['caption_channels'], 'id': known or None},
                f'in {path}', f'in {source}', 'the text encoder does not fit the model',
                'Give --text_encoder the folder of the encoder that the model was trained with.',
                none_fits=True)
