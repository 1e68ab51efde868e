"""The sources a recipe can name, and `open_source`, which opens one or says what is missing.

    digits, synthetic     no data needed
    imagenet2012          the tfds data set; python -m lit_jax.data.prepare_imagenet makes it
    tfds:NAME[/CONFIG]    any picture data set that tfds prepared as ArrayRecord
    folder                pictures of one's own: lit_jax/data/folder.py
    latents               pictures as a VAE saw them
"""
import os
from dataclasses import dataclass
from pathlib import Path

from lit_jax.data.base import Source, Spec
from lit_jax.data.digits import SPEC as DIGITS_SPEC
from lit_jax.data.digits import open_digits
from lit_jax.data.folder import open_folder
from lit_jax.data.latents import open_latents
from lit_jax.data.subset import choose_classes
from lit_jax.data.synthetic import SPLITS as SYNTHETIC_SPLITS
from lit_jax.data.synthetic import SyntheticSource
from lit_jax.data.tfds_images import open_tfds
from lit_jax.errors import UserError
from lit_jax.paths import cache_folder

__all__ = ['SOURCES', 'Source', 'Spec', 'default_data_dir', 'open_source']


def default_data_dir() -> Path:
    """$LIT_JAX_DATA, else datasets/ in the cache folder."""
    given = os.environ.get('LIT_JAX_DATA')
    return Path(given).expanduser() if given else cache_folder() / 'datasets'


@dataclass(frozen=True)
class Request:
    """What `open_source` was asked for, checked as far as that is the same for every source."""
    name: str
    split: str
    asked: dict[str, int | None]  # image_size, channels, num_classes
    data_dir: str | Path
    path: str | Path
    seed: int
    strict: bool


def open_source(name: str, *, split: str = 'train', image_size: int | None = None, channels: int | None = None,
                num_classes: int | None = None, classes: str = '', data_dir: str | Path = '', path: str | Path = '',
                seed: int = 0, strict: bool = False) -> Source:
    """Opens a source by its name in SOURCES.

    Args:
        split: 'train', or 'held_out' (never shown in training).
        image_size, channels, num_classes: of the elements, as the network sees them (latents: of the latent). None
            takes the source's own; another number than a real source has is an error. Pictures are cropped to
            image_size, which must be given for them.
        classes: '' for all, or a list of the classes to take, numbered anew (`lit_jax.data.subset`); num_classes is then
            their number. Synthetic examples have as many classes as asked for, and none of a list.
        data_dir: folder that holds all data sets ('' = `default_data_dir()`).
        path: folder of this one data set: the pictures of 'folder', or latents that are not in their usual place.
        seed: of synthetic examples; real sources ignore it.
        strict: stop at the first picture that cannot be decoded, instead of taking the next one (sources of pictures).
    Raises:
        UserError: unknown name or split, numbers that the source cannot serve, or data that is not there.
    """
    key = 'tfds:NAME' if name.startswith('tfds:') else name
    if key not in SOURCES:
        raise UserError(f'unknown data.name {name!r}; known: {", ".join(SOURCES)}')
    asked = {'image_size': image_size, 'channels': channels, 'num_classes': num_classes}
    for field, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f'{field} of the data must be at least 1, got {value}')
    if not 0 <= seed < 2**63:
        raise UserError(f'the seed must be in [0, 2^63), got {seed}')
    folder = os.path.expanduser(data_dir) if data_dir else default_data_dir()
    chooses = classes and name != 'synthetic'
    request = Request(name=name, split=split, asked=asked | ({'num_classes': None} if chooses else {}), data_dir=folder,
                      path=os.path.expanduser(path), seed=seed, strict=strict)
    source = SOURCES[key](request)
    return choose_classes(source, classes, num_classes) if chooses else source


def _digits(request: Request) -> Source:
    for key, value in request.asked.items():
        own = getattr(DIGITS_SPEC, key)
        if value not in (None, own):
            raise UserError(f'digits has {key} {own}, the recipe asks for {value}; set it to {own}, or take '
                            '--config.data.name=synthetic, which has any')
    return open_digits(request.split, Path(request.data_dir))


def _synthetic(request: Request) -> Source:
    if request.split not in SYNTHETIC_SPLITS:
        raise UserError(f'synthetic has no split {request.split!r}; known: {", ".join(SYNTHETIC_SPLITS)}')
    defaults = {'image_size': 32, 'channels': 4, 'num_classes': 10}
    chosen = {key: default if request.asked[key] is None else request.asked[key] for key, default in defaults.items()}
    names = tuple(f'synthetic {i}' for i in range(chosen['num_classes']))
    return SyntheticSource(Spec(**chosen, class_names=names), split=request.split, seed=request.seed)


def _tfds(request: Request) -> Source:
    return open_tfds(request.name.removeprefix('tfds:'), split=request.split, data_dir=request.data_dir,
                     asked=request.asked, strict=request.strict)


def _folder(request: Request) -> Source:
    return open_folder(request.path, split=request.split, asked=request.asked, strict=request.strict)


def _latents(request: Request) -> Source:
    size, channels = request.asked['image_size'] or 32, request.asked['channels'] or 4
    folder = request.path or Path(request.data_dir) / f'imagenet_latents_{size}x{size}x{channels}'
    try:
        return open_latents(folder, split=request.split, asked=request.asked)
    except UserError as error:
        if os.path.exists(folder):
            raise
        raise UserError(f'{error}. To run the recipe without data: --config.data.name=synthetic') from error


SOURCES = {'digits': _digits, 'synthetic': _synthetic, 'latents': _latents, 'imagenet2012': _tfds,
           'tfds:NAME': _tfds, 'folder': _folder}


def is_picture_source(name: str) -> bool:
    """Whether a source holds encoded pictures, which are decoded and cropped as they are read."""
    return name.startswith('tfds:') or SOURCES.get(name) in (_tfds, _folder)
