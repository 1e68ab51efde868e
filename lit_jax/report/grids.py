"""Turns sampled arrays into images: bytes, grids, labelled sheets, PNG files. numpy and Pillow only."""
import io
import math
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, make_folder, write_bytes_atomic

LETTER, GAP = 14, 24      # pixels: height of the letters of a sheet, and between its grids

_SIGNATURE, _KEYWORD = b'\x89PNG\r\n\x1a\n', 'lit_jax'


def to_uint8(images_BHWC, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """Images in [low, high] as uint8 of the same shape; values outside are clamped.

    For [-1, 1]: 127.5 x + 128, clamped and truncated, as in the sampling scripts of DiT from whose images FID
    is computed. Raises UserError for NaN or infinity."""
    if not low < high:
        raise UserError(f'low must be below high, got {low} and {high}')
    images = _finite(images_BHWC)
    scale = 255 / (high - low)
    return np.clip(images * scale + (128 - scale * (low + high) / 2), 0, 255).astype(np.uint8)


def false_colour(latents_BHWC) -> np.ndarray:
    """The first three channels of latents as uint8 [B, H, W, 3], each image stretched to its own range."""
    latents = _finite(latents_BHWC)
    if latents.ndim != 4 or latents.shape[-1] < 3:
        raise UserError(f'false colours need [B, H, W, C], at least 3 channels, got {list(latents.shape)}')
    latents = latents[..., :3]
    low, high = (reduce(latents, axis=(1, 2, 3), keepdims=True) for reduce in (np.min, np.max))
    flat = high == low
    stretched = np.where(flat, 0.5, (latents - low) / np.where(flat, 1, high - low))
    return to_uint8(stretched, 0.0, 1.0)


def viewable(images_BHWC, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """`to_uint8` for grey and RGB images, `false_colour` for anything with more channels."""
    grey_or_rgb = np.shape(images_BHWC)[-1] in (1, 3)
    return to_uint8(images_BHWC, low, high) if grey_or_rgb else false_colour(images_BHWC)


def make_grid(images_BHWC, columns: int, pad: int = 4, scale: int = 1, background: int = 255) -> np.ndarray:
    """Arranges images uint8 [B, H, W, C] row by row in one uint8 image [height, width, C].

    columns: images per row. pad: pixels of `background` between and around them. scale: whole-number zoom."""
    images = np.asarray(images_BHWC)
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise UserError(f'a grid is made of uint8 images [B, H, W, C], at least one; got {images.dtype} '
                        f'{list(images.shape)} (to_uint8 or viewable makes them)')
    if columns < 1 or scale < 1 or pad < 0:
        raise UserError('columns and scale must be at least 1 and pad at least 0; got '
                        f'{columns}, {scale}, {pad}')
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), background,
                   np.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top:top + height, left:left + width] = image
    return grid


def make_sheet(panels: Sequence[tuple[str, np.ndarray]], columns: int, row_names: Sequence[str], pad: int = 4,
               scale: int = 1) -> np.ndarray:
    """Grids side by side, each with a title above and row names at the left: uint8 [height, width, 3].

    Args:
        panels: (title or '', images uint8 [B, H, W, 1 or 3]), all of one shape. For the rest see `make_grid`.
        row_names: one per row of a grid, '' for none. Long ones are cut."""
    if not panels or len({np.shape(images) for _, images in panels}) > 1:
        shapes = [list(np.shape(images)) for _, images in panels]
        raise UserError(f'a sheet needs panels of one shape, at least one; got {shapes}')
    grids = [make_grid(images, columns, pad, scale) for _, images in panels]
    grids = [np.broadcast_to(grid, (*grid.shape[:2], 3)) for grid in grids]
    rows = math.ceil(len(panels[0][1]) / columns)
    if len(row_names) != rows:
        raise UserError(f'{rows} rows need {rows} names, got {len(row_names)}')
    font = ImageFont.load_default(LETTER)
    names, titles = ([_printable(text) for text in texts]
                     for texts in (row_names, [title for title, _ in panels]))
    left = max((math.ceil(font.getlength(name)) for name in names), default=0)
    left, top, gap = left + 8 * (left > 0), (LETTER + 8) * any(titles), GAP
    height, width = grids[0].shape[:2]
    width = max(width, *(math.ceil(font.getlength(title)) for title in titles))     # titles may be wider
    sheet = Image.new('RGB', (left + len(grids) * width + (len(grids) - 1) * gap, top + height), 'white')
    draw = ImageDraw.Draw(sheet)
    for k, (title, grid) in enumerate(zip(titles, grids, strict=True)):
        sheet.paste(Image.fromarray(grid), (left + k * (width + gap), top))
        draw.text((left + k * (width + gap) + pad, top // 2), title, fill='black', font=font, anchor='lm')
    step = (height - pad) / rows
    for row, name in enumerate(names):
        draw.text((2, top + pad / 2 + (row + 0.5) * step), name, fill='black', font=font, anchor='lm')
    return np.asarray(sheet)


def _printable(text: str, most: int = 32) -> str:
    """One line in Pillow's default font, which has Latin letters only."""
    text = ''.join(letter if letter.isprintable() else ' ' for letter in text)
    text = text.encode('latin-1', 'replace').decode('latin-1')
    return text if len(text) <= most else text[:most - 3] + '...'


def to_pil(image: np.ndarray) -> Image.Image:
    """A uint8 image, grey [H, W] or [H, W, 1] or RGB [H, W, 3], for Pillow."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.dtype != np.uint8 or not (image.ndim == 2 or image.ndim == 3 and image.shape[-1] == 3):
        raise UserError(f'a PNG is written from uint8 [H, W], [H, W, 1] or [H, W, 3]; got {image.dtype} '
                        f'{list(image.shape)} (viewable makes colours of more channels)')
    return Image.fromarray(image)


def save_png(path, image: np.ndarray, mark: str = '') -> None:
    """Writes an image as `to_pil` takes it. Makes the folder; never leaves half a file. mark: a text beside
    the pixels, which `png_mark` finds."""
    path, encoded, beside = as_path(path), io.BytesIO(), PngInfo()
    if mark:
        beside.add_itxt(_KEYWORD, mark)
    to_pil(image).save(encoded, format='PNG', pnginfo=beside)
    make_folder(path.parent)
    write_bytes_atomic(path, encoded.getvalue())


def png_mark(data: bytes) -> str | None:
    """The mark of a PNG file, '' without one; None for a file that is not whole: not all of its chunks have
    the CRC-32 that was written with them."""
    at, kind, mark = len(_SIGNATURE), b'', ''
    while kind != b'IEND':
        end = at + 12 + int.from_bytes(data[at:at + 4])
        kind, content = data[at + 4:at + 8], data[at + 8:end - 4]
        if end > len(data) or zlib.crc32(kind + content) != int.from_bytes(data[end - 4:end]):
            return None
        if kind == b'iTXt' and content.startswith(_KEYWORD.encode() + b'\0'):
            mark = content.rpartition(b'\0')[2].decode(errors='replace')
        at = end
    return mark if data.startswith(_SIGNATURE) and at == len(data) else None


def _finite(images) -> np.ndarray:
    images = np.asarray(images, np.float32)
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(bad):
        raise UserError(f'image(s) {", ".join(map(str, bad[:8]))} of {len(images)} contain NaN or infinity: '
                        'the model or the sampler that made them has diverged')
    return images
