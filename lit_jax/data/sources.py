"""The sources that a recipe can name, and `open_source`, which opens one or says what is missing.

    digits, mnist, synthetic    no data needed
    imagenet2012          the tfds data set, made by python -m lit_jax.data.prepare_imagenet
    tfds:NAME[/CONFIG]    any image data set prepared by tfds as ArrayRecord
    folder                your own images: lit_jax/data/folder.py
    latents               images encoded by a VAE

With captions instead of labels (lit_jax/data/captions.py):

    shapes                rendered shapes; no data needed
    captions              a folder of images with captions, or of tar shards: caption_folder.py, tar_shards.py
    caption_latents       both, encoded by a VAE and a text encoder

One's own: 'package.module:function', a function of `Asked` that returns a `Source`.

A source is imported when it is opened: a training run needs one of them.
"""
import os
from dataclasses import dataclass
from pathlib import Path

from lit_jax.data.base import Source, Spec
from lit_jax.runtime.errors import UserError, did_you_mean, shown
from lit_jax.runtime.own_modules import call_function
from lit_jax.runtime.paths import absolute, cache_folder, is_remote

__all__ = ['CAPTIONED', 'SOURCES', 'Asked', 'Source', 'Spec', 'default_data_dir', 'has_captions',
           'is_image_source', 'is_own', 'open_captioned', 'open_source']


def default_data_dir() -> Path:
    """$LIT_JAX_DATA, else datasets/ in the cache folder."""
    given = os.environ.get('LIT_JAX_DATA')
    return Path(given).expanduser() if given else cache_folder() / 'datasets'


@dataclass(frozen=True)
class Asked:
    """Checked arguments of `open_source`: what a recipe wants of its data."""
    name: str
    split: str                    # 'train' or 'held_out'
    asked: dict[str, int | None]  # image_size, channels, num_classes; None: as in the data
    data_dir: str | Path
    path: str | Path
    seed: int
    strict: bool
    buckets: bool = False
    multiple: int = 1
    caption_tokens: int | None = None


def open_source(name: str, *, split: str = 'train', image_size: int | None = None,
                channels: int | None = None, num_classes: int | None = None, classes: str = '',
                data_dir: str | Path = '', path: str | Path = '', seed: int = 0, strict: bool = False,
                tokenizer=None, caption_tokens: int | None = None, buckets: bool = False,
                multiple: int = 1) -> Source:
    """Opens a source by its name in SOURCES, or one's own, whose module is imported.

    Args:
        split: 'train', or 'held_out' (never used in training).
        image_size, channels, num_classes: of the elements, as the network gets them (of latents: the
            latent's). None: as in the data; other numbers than those of real data are an error. Images
            need image_size, to which they are cropped.
        classes: list of the classes to use (`lit_jax.data.subset`), which are renumbered; '': all.
            num_classes is then their number. Synthetic data ignores it.
        data_dir: folder of all data sets ('' = `default_data_dir()`).
        path: folder of this data set: images of 'folder', or latents outside their usual place.
        seed: of synthetic examples.
        strict: stop at the first image that cannot be decoded instead of taking the next one, and at images
            without captions or captions without images instead of leaving them out.
        tokenizer: `lit_jax.text.tokenizer.Tokenizer`, for shapes and captions.
        caption_tokens: tokens to which captions are padded or cut (L); caption_latents must have this number.
        buckets: captions: crop to shapes near each image's ratio (lit_jax/data/buckets.py), not squares.
            caption_latents: whether they must have several shapes.
        multiple: of the sides of captioned images, in pixels: those of the VAE times those of a patch.
    Raises:
        UserError: unknown name or split, numbers that do not fit the data, or missing data."""
    _check_text(name, tokenizer, caption_tokens, buckets, classes)
    asked = {'image_size': image_size, 'channels': channels, 'num_classes': num_classes}
    request = _request(name, classes=classes, split=split, asked=asked, data_dir=data_dir, path=path,
                       seed=seed, strict=strict, buckets=buckets, multiple=multiple,
                       caption_tokens=caption_tokens)
    source = _own(request) if is_own(name) else SOURCES[_key(name)](request)
    if name in CAPTIONED:
        from lit_jax.data.captions import Captioned
        return Captioned(source, tokenizer, caption_tokens)
    if classes and name != 'synthetic':
        from lit_jax.data.subset import choose_classes
        return choose_classes(source, classes, num_classes)
    return source


def open_captioned(name: str, *, split: str = 'train', image_size: int, data_dir: str | Path = '',
                   path: str | Path = '', seed: int = 0, strict: bool = False, buckets: bool = False,
                   multiple: int = 1) -> Source:
    """A source in CAPTIONED with its captions as text. Arguments as of `open_source`."""
    _check_text(name, True, 1, buckets, '')
    asked = {'image_size': image_size, 'channels': None, 'num_classes': None}
    return SOURCES[name](_request(name, split=split, asked=asked, data_dir=data_dir, path=path, seed=seed,
                                  strict=strict, buckets=buckets, multiple=multiple))


def _key(name: str) -> str:
    return 'tfds:NAME' if name.startswith('tfds:') else name


def _request(name: str, *, asked: dict, data_dir: str | Path, path: str | Path, seed: int, classes: str = '',
             **options) -> Asked:
    for field, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f'{field} of the data must be at least 1, got {value}')
    if not 0 <= seed < 2**63:
        raise UserError(f'the seed must be in [0, 2^63), got {seed}')
    folder = os.path.expanduser(data_dir) if data_dir else default_data_dir()
    if classes and name != 'synthetic':
        asked = asked | {'num_classes': None}
    return Asked(name=name, asked=asked, data_dir=folder, path=os.path.expanduser(path), seed=seed,
                   **options)


def _check_text(name: str, tokenizer, caption_tokens: int | None, buckets: bool, classes: str) -> None:
    """Captions need a tokenizer, labels none."""
    if _key(name) not in SOURCES and not is_own(name):
        raise UserError(f'unknown data.name {shown(name)}{did_you_mean(name, SOURCES)}; known: '
                        f"{', '.join(SOURCES)}, or one's own as package.module:function")
    texts = name in CAPTIONED or name == 'caption_latents'
    if not texts and (tokenizer is not None or caption_tokens is not None or buckets):
        raise UserError(f'{name} has labels, and neither captions nor buckets; for a text-to-image model '
                        f'use --config.data.name={", ".join((*CAPTIONED, "caption_latents"))}')
    if texts and classes:
        raise UserError(f'{name} has captions and no classes: leave data.classes={classes} empty')
    if name in CAPTIONED and (tokenizer is None or not caption_tokens):
        raise UserError(f'{name} has captions: give the folder of a text encoder, for its tokenizer '
                        '(--config.text.encoder_path), and the number of tokens per caption')
    if name == 'shapes' and buckets:
        raise UserError('shapes are squares and have no buckets')


def is_own(name: str) -> bool:
    """Whether a name is that of a data set of one's own, package.module:function."""
    module, colon, function = name.partition(':')
    return bool(module and colon and function) and module != 'tfds'


def _own(request: Asked) -> Source:
    source = call_function('the data set', request.name, request)
    if not isinstance(source, Source):
        raise UserError(f'{request.name} returns {shown(source)}; it must return a lit_jax.data.base.Source')
    _check_own(request.name, source.spec, request)
    return source


def _digits(request: Asked) -> Source:
    from lit_jax.data.toys.digits import SPEC, open_digits
    _check_own('digits', SPEC, request)
    return open_digits(request.split, Path(request.data_dir))


def _mnist(request: Asked) -> Source:
    from lit_jax.data.toys.mnist import SPEC, open_mnist
    _check_own('mnist', SPEC, request)
    return open_mnist(request.split)


def _check_own(name: str, spec: Spec, request: Asked) -> None:
    for key, value in request.asked.items():
        own = getattr(spec, key)
        if value not in (None, own):
            raise UserError(f'{name} has {key} {own}, the recipe asks for {value}; set it to {own}, or use '
                            '--config.data.name=synthetic, which takes any')


def _synthetic(request: Asked) -> Source:
    from lit_jax.data.synthetic import SPLITS, SyntheticSource
    if request.split not in SPLITS:
        raise UserError(f'synthetic has no split {shown(request.split)}; known: {", ".join(SPLITS)}')
    defaults = {'image_size': 32, 'channels': 4, 'num_classes': 10}
    chosen = {key: default if request.asked[key] is None else request.asked[key]
              for key, default in defaults.items()}
    names = tuple(f'synthetic {i}' for i in range(chosen['num_classes']))
    return SyntheticSource(Spec(**chosen, class_names=names), split=request.split, seed=request.seed)


def _tfds(request: Asked) -> Source:
    from lit_jax.data.tfds_images import open_tfds
    return open_tfds(request.name.removeprefix('tfds:'), split=request.split, data_dir=request.data_dir,
                     asked=request.asked, strict=request.strict)


def _folder(request: Asked) -> Source:
    from lit_jax.data.folder import open_folder
    return open_folder(request.path, split=request.split, asked=request.asked, strict=request.strict)


def _shapes(request: Asked) -> Source:
    from lit_jax.data.buckets import check_sides
    from lit_jax.data.toys.shapes import LENGTHS, NOMINAL, SMALLEST_IMAGE, ShapesSource
    if request.split not in LENGTHS:
        raise UserError(f'shapes have no split {shown(request.split)}; known: {", ".join(LENGTHS)}')
    size = request.asked['image_size'] or NOMINAL
    if size < SMALLEST_IMAGE:
        raise UserError(f'shapes need images of {SMALLEST_IMAGE} pixels or more, the recipe asks for {size}')
    if request.asked['channels'] not in (None, 3):
        raise UserError(f'shapes have 3 channels, the recipe asks for {request.asked["channels"]}')
    check_sides(size, request.multiple)
    return ShapesSource(split=request.split, seed=request.seed, image_size=size)


def _captions(request: Asked) -> Source:
    """A folder of images or of tar shards, by its content."""
    from lit_jax.data.buckets import bucket_table, check_sides
    from lit_jax.data.caption_folder import open_caption_folder
    from lit_jax.data.folder import SPLITS, split_folder
    from lit_jax.data.images import check_asked
    from lit_jax.data.tar_shards import open_tar_shards, tar_files
    if request.split not in SPLITS:
        raise UserError(f'captions has no split {shown(request.split)}; known: {", ".join(SPLITS)}')
    if not os.fspath(request.path):
        raise UserError('data.name=captions needs the folder of the images and captions: '
                        '--config.data.path=FOLDER')
    size = check_asked('captions', {**request.asked, 'num_classes': None}, 0)
    check_sides(size, request.multiple)
    table = bucket_table(size, request.multiple) if request.buckets else ()
    options = {'image_size': size, 'table': table, 'strict': request.strict}
    root = absolute(request.path)
    if root.suffix == '.tar' and not root.is_dir():
        return open_tar_shards(_local([root]), **options)
    base = split_folder(root, request.split)
    if tars := tar_files(base):
        return open_tar_shards(_local(tars), **options)
    return open_caption_folder(base, **options)


def _local(paths: list) -> list[Path]:
    if is_remote(paths[0]):
        raise UserError(f'{paths[0]}: tar shards are read from a disk. Copy them to every host (gcloud '
                        'storage cp -r), or mount the bucket (gcsfuse) and give that folder')
    return [Path(path) for path in paths]


def _caption_latents(request: Asked) -> Source:
    from lit_jax.data.caption_latents import open_caption_latents
    return open_caption_latents(request.path, split=request.split, asked=request.asked,
                                tokens=request.caption_tokens, buckets=request.buckets)


def _latents(request: Asked) -> Source:
    from lit_jax.data.latents import open_latents
    size, channels = request.asked['image_size'] or 32, request.asked['channels'] or 4
    folder = request.path or Path(request.data_dir) / f'imagenet_latents_{size}x{size}x{channels}'
    try:
        return open_latents(folder, split=request.split, asked=request.asked)
    except UserError as error:
        if os.path.exists(folder):
            raise
        raise UserError(f'{error}. To run the recipe without data: --config.data.name=synthetic') from error


SOURCES = {'digits': _digits, 'mnist': _mnist, 'synthetic': _synthetic, 'latents': _latents,
           'imagenet2012': _tfds, 'tfds:NAME': _tfds, 'folder': _folder, 'shapes': _shapes,
           'captions': _captions, 'caption_latents': _caption_latents}
CAPTIONED = ('shapes', 'captions')  # sources that need a tokenizer


def is_image_source(name: str) -> bool:
    """Whether a source has encoded images, decoded and cropped as they are read."""
    return name.startswith('tfds:') or SOURCES.get(name) in (_tfds, _folder, _captions)


def has_captions(name: str) -> bool:
    """Whether the examples of a source have captions (tokens or features) instead of labels."""
    return name in CAPTIONED or name == 'caption_latents'
