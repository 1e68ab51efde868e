"""The sources a recipe can name, and `open_source`, which opens one or says what is missing."""
import os
from pathlib import Path

from lit_jax.data.base import Source, Spec
from lit_jax.data.digits import SPEC as DIGITS_SPEC
from lit_jax.data.digits import open_digits
from lit_jax.data.synthetic import SPLITS as SYNTHETIC_SPLITS
from lit_jax.data.synthetic import SyntheticSource
from lit_jax.errors import UserError

__all__ = ['SOURCES', 'Source', 'Spec', 'default_data_dir', 'open_source']


def default_data_dir() -> Path:
    """$LIT_JAX_DATA, else ~/.cache/lit_jax/datasets."""
    return Path(os.environ.get('LIT_JAX_DATA') or '~/.cache/lit_jax/datasets').expanduser()


def open_source(name: str, *, split: str = 'train', image_size: int | None = None, channels: int | None = None,
                num_classes: int | None = None, data_dir: str | Path = '', path: str | Path = '',
                seed: int = 0) -> Source:
    """Opens a source by its name in SOURCES.

    Args:
        split: 'train', or 'held_out' (never shown in training).
        image_size, channels, num_classes: of the elements, as the network sees them (latents: of the latent). None
            takes the source's own; another number than a real source has is an error.
        data_dir: folder that holds all data sets ('' = `default_data_dir()`).
        path: folder of this one data set, where it is not in its usual place in `data_dir` (latents).
        seed: of synthetic examples; real sources ignore it.
    Raises:
        UserError: unknown name or split, numbers that the source cannot serve, or data that is not there.
    """
    if name not in SOURCES:
        raise UserError(f'unknown data.name {name!r}; known: {", ".join(SOURCES)}')
    asked = {'image_size': image_size, 'channels': channels, 'num_classes': num_classes}
    for key, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f'{key} of the data must be at least 1, got {value}')
    if not 0 <= seed < 2**63:
        raise UserError(f'the seed must be in [0, 2^63), got {seed}')
    folder = Path(data_dir).expanduser() if data_dir else default_data_dir()
    return SOURCES[name](split=split, asked=asked, data_dir=folder, path=path, seed=seed)


def _digits(*, split, asked, data_dir, path, seed) -> Source:
    for key, value in asked.items():
        own = getattr(DIGITS_SPEC, key)
        if value not in (None, own):
            raise UserError(f'digits has {key} {own}, the recipe asks for {value}; set it to {own}, or take '
                            '--config.data.name=synthetic, which has any')
    return open_digits(split, data_dir)


def _synthetic(*, split, asked, data_dir, path, seed) -> Source:
    if split not in SYNTHETIC_SPLITS:
        raise UserError(f'synthetic has no split {split!r}; known: {", ".join(SYNTHETIC_SPLITS)}')
    defaults = {'image_size': 32, 'channels': 4, 'num_classes': 10}
    chosen = {key: default if asked[key] is None else asked[key] for key, default in defaults.items()}
    names = tuple(f'synthetic {i}' for i in range(chosen['num_classes']))
    return SyntheticSource(Spec(**chosen, class_names=names), split=split, seed=seed)


def _latents(*, split, asked, data_dir, path, seed) -> Source:
    """VAE latents of ImageNet: their reader comes with the ImageNet road, so that a recipe can only be told so."""
    size, channels = asked['image_size'] or 32, asked['channels'] or 4
    folder = Path(path).expanduser() if path else data_dir / f'imagenet_latents_{size}x{size}x{channels}'
    without = 'To run the recipe without data: --config.data.name=synthetic'
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}. It should hold VAE latents of ImageNet '
                        f'({size}x{size}x{channels} each), made by: python prepare_latents.py '
                        f'(comes with the ImageNet road). {without}')
    raise UserError(f'{folder} is there, but this version cannot read VAE latents yet: the reader comes with '
                    f'prepare_latents.py and the ImageNet road. {without}')


SOURCES = {'digits': _digits, 'synthetic': _synthetic, 'latents': _latents}
