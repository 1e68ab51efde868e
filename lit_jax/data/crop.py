"""The centre crop of ADM (guided diffusion), bit for bit, which DiT and its descendants are trained with.

An image becomes RGB; it is halved with a box filter while its shorter side is at least twice the target size;
bicubic resampling brings the shorter side to the size (the other is rounded), and the middle is cut out. EXIF
orientation is ignored and alpha is dropped, as in the reference."""
import numpy as np
from PIL import Image

RULE = 'adm-center-crop'  # recorded in data sets made with this crop
# 1x5000 pixels would grow to 1.3 billion on the way to 512x512. Pillow refuses images above this size, too.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of an image of any mode and size; errors as for `cover_crop`."""
    return cover_crop(image, (size, size))


def cover_crop(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """The middle, uint8 [H, W, 3], of an image resized to cover the shape. ValueError above MAX_PIXELS."""
    rows, columns = shape
    if image.mode != 'RGB':
        image = image.convert('RGB')  # first, so that RGB values are mixed, not palette numbers or CMYK
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
    """A view of an array [..., H, W, C] with left and right exchanged."""
    return array[..., ::-1, :]
