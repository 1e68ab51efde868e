"""The centre crop of ADM (guided diffusion), which DiT and its descendants train and are judged on, bit for
bit.

An image becomes RGB first; its shorter side is halved with a box filter while it is at least twice the size
asked for; bicubic resampling then brings the shorter side to the size (the other one is rounded), and the
middle is cut out. Nothing else happens to it: EXIF orientation is ignored and alpha is dropped, because the
reference does so too.
"""
import numpy as np
from PIL import Image

RULE = 'adm-center-crop'  # the name that data sets made with this crop carry
# An image of 1x5000 pixels grows to 1.3 billion on its way to 512x512. From here on Pillow, too, refuses to
# open one.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of an image of any mode and size; errors as of `cover_crop`."""
    return cover_crop(image, (size, size))


def cover_crop(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3]: an image resized to cover the shape (H, W), and the middle cut out.

    Raises ValueError for an image so long and thin that the resized one would have more than MAX_PIXELS
    pixels."""
    rows, columns = shape
    if image.mode != 'RGB':
        # before resampling: colours are mixed as RGB, never as palette numbers or CMYK
        image = image.convert('RGB')
    while image.width >= 2 * columns and image.height >= 2 * rows:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(columns / image.width, rows / image.height)
    width, height = max(columns, round(image.width * scale)), max(rows, round(image.height * scale))
    if width * height > MAX_PIXELS:
        raise ValueError(f'too long and thin to crop: {image.width}x{image.height} would grow to '
                         f'{width}x{height}')
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - columns) // 2, (height - rows) // 2
    return np.array(image.crop((left, top, left + columns, top + rows)))


def flip(array: np.ndarray) -> np.ndarray:
    """The mirror image (left and right exchanged) of an array [..., H, W, C], as a view of it."""
    return array[..., ::-1, :]
