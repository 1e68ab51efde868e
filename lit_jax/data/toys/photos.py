"""Makes a small image folder: crops of real photographs that come with scikit-image and scikit-learn.

    python -m lit_jax.data.toys.photos --out images --size 64 --per_photo 160

writes images/train/NAME/0000.png and images/held_out/NAME/0000.png, one class per photograph. Held-out crops
come from the right quarter of each photograph, the others from the rest, without overlap."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import option, parse_options

# Photographs only (the packages also ship drawings, text and masks). Licences: the README of skimage/data.
SKIMAGE = ('astronaut.png', 'brick.png', 'camera.png', 'chelsea.png', 'coffee.png', 'coins.png', 'grass.png',
           'gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png', 'motorcycle_left.png', 'retina.jpg',
           'rocket.jpg')
SKLEARN = ('china.jpg', 'flower.jpg')
HELD_OUT = 0.25       # share of each photograph's width


def find_photos() -> list[Path]:
    """The files, sorted by name. UserError without scikit-image."""
    import sklearn.datasets
    try:
        import skimage
    except ImportError as error:
        raise UserError('the photographs come with scikit-image: pip install "lit_jax[test]"') from error
    folders = {Path(skimage.__file__).parent / 'data': SKIMAGE,
               Path(sklearn.datasets.__file__).parent / 'images': SKLEARN}
    return sorted((folder / name for folder, names in folders.items() for name in names),
                  key=lambda path: path.name)


def cut(photo: Image.Image, size: int, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """`count` random square windows, size to 3·size wide where the photograph allows, scaled to size."""
    largest = min(3 * size, *photo.size)
    crops = []
    for _ in range(count):
        side = int(rng.integers(min(size, largest), largest + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + side, top + side))
        crops.append(crop.resize((size, size), Image.Resampling.LANCZOS))
    return crops


@dataclass(frozen=True)
class PhotoOptions:
    out: str = option('output folder')
    size: int = option('side of the crops in pixels', default=64)
    per_photo: int = option('training crops of each photograph', default=160)


def write_photos(out, *, size: int = PhotoOptions.size, per_photo: int = PhotoOptions.per_photo,
                 held_out: int = 16, seed: int = 0) -> Path:
    """Writes the image folder, reproducibly, and returns it. UserError if `out` exists and is not empty."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f'{out} exists and is not empty; give another --out')
    for path in find_photos():
        photo = Image.open(path).convert('RGB')
        border = round((1 - HELD_OUT) * photo.width)
        parts = {'train': (photo.crop((0, 0, border, photo.height)), per_photo),
                 'held_out': (photo.crop((border, 0, *photo.size)), held_out)}
        rng = np.random.default_rng([seed, *path.stem.encode()])
        for split, (part, count) in parts.items():
            folder = out / split / path.stem
            folder.mkdir(parents=True)
            for number, crop in enumerate(cut(part, size, count, rng)):
                crop.save(folder / f'{number:04d}.png')
    return out


def main() -> None:
    options = parse_options(PhotoOptions, prog='python -m lit_jax.data.toys.photos', description=__doc__)
    print(f'wrote {write_photos(options.out, size=options.size, per_photo=options.per_photo)}')


if __name__ == '__main__':
    cli.run(main)
