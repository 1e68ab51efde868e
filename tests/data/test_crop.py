"""The crop of ADM, bit for bit, for images of every kind; and the flip."""
import numpy as np
import pytest
from image_files import encoded, noise
from PIL import Image

from lit_jax.data import crop
from lit_jax.data.crop import center_crop, flip
from lit_jax.data.images import decode


def reference(data: bytes, size: int, folder) -> np.ndarray:
    """The published procedure in its plainest form: from a file, whole arrays, one step after the other."""
    path = folder / 'picture'
    path.write_bytes(data)
    with open(path, 'rb') as file:
        image = Image.open(file).convert('RGB')
    short = min(image.width, image.height)
    while short >= size * 2:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        short = min(image.width, image.height)
    ratio = size / short
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.BICUBIC)
    rows, columns, _ = np.array(image).shape
    first_row, first_column = (rows - size) // 2, (columns - size) // 2
    return np.array(image)[first_row:first_row + size, first_column:first_column + size]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# How each kind is made from (width, height, number).
KINDS = {
    'colour jpeg': lambda w, h, i: encoded(noise(w, h, seed=i), 'JPEG', quality=90),
    'colour png': lambda w, h, i: encoded(noise(w, h, seed=i)),
    'grey': lambda w, h, i: encoded(noise(w, h, 'L', i), 'JPEG' if i % 2 else 'PNG'),
    'cmyk': lambda w, h, i: encoded(noise(w, h, 'CMYK', i), 'JPEG' if i % 2 else 'TIFF'),
    'palette': lambda w, h, i: encoded(noise(w, h, 'P', i), 'GIF' if i % 2 else 'PNG'),
    'transparent palette': lambda w, h, i: encoded(noise(w, h, 'P', i), transparency=3),
    'alpha': lambda w, h, i: encoded(noise(w, h, 'RGBA', i), **({} if i % 2 else {'compress_level': 1})),
    'grey alpha': lambda w, h, i: encoded(noise(w, h, 'LA', i)),
    'black and white': lambda w, h, i: encoded(noise(w, h, '1', i)),
    'exif': lambda w, h, i: encoded(noise(w, h, seed=i), 'JPEG', exif=_exif(1 + i % 8)),
    'webp': lambda w, h, i: encoded(noise(w, h, seed=i), 'WEBP', quality=80),
}
# Sizes around every border of the procedure, for a crop of 32: 1 pixel, 1 short of, at and beyond 32 and its
# doubles.
SIDES = (1, 2, 3, 15, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 200, 255, 301)


def cases():
    """(name, encoded image, crop size) of 200 images."""
    rng = np.random.default_rng(7)
    for number in range(176):
        kind = list(KINDS)[number % len(KINDS)]
        width, height = (int(side) for side in rng.choice(SIDES, 2))
        yield f'{number} {kind} {width}x{height}', KINDS[kind](width, height,
                                                               number), (32, 32, 20, 33)[number // 11 % 4]
    thin = [(1, h) for h in (1, 2, 40, 333, 1500)] + [(w, 1)
                                                      for w in (2, 40, 333, 1500)] + [(1, 64), (2, 999),
                                                                                      (5000, 3)]
    for number, (width, height) in enumerate(thin):
        kind = list(KINDS)[(3 * number + 1) % len(KINDS)]
        yield f'thin {kind} {width}x{height}', KINDS[kind](width, height, number), 32
    huge = [(3000, 2501), (2047, 4097), (1024, 1024), (1023, 1537), (511, 513), (500, 375), (375, 500),
            (512, 2048), (4001, 600), (256, 256), (255, 257), (90, 2100)]
    for number, (width, height) in enumerate(huge):
        kind = ('colour jpeg', 'grey', 'cmyk', 'exif')[number % 4]
        yield f'huge {kind} {width}x{height}', KINDS[kind](width, height,
                                                           2 * number + 1), 256 if number % 3 else 64


def test_bit_equal_to_the_reference_on_200_images_of_odd_sizes(tmp_path):
    different, count = [], 0
    for name, data, size in cases():
        ours = center_crop(decode(data), size)
        assert ours.shape == (size, size, 3) and ours.dtype == np.uint8 and ours.flags['C_CONTIGUOUS'], name
        count += 1
        if not np.array_equal(ours, reference(data, size, tmp_path)):
            different.append(name)
    assert count == 200 and different == []


def test_halving_averages_two_by_two_and_the_middle_is_cut_out():
    """By hand: 8x4 is halved once to 4x2, which is the size; columns 1 and 2 remain."""
    grey = np.array([[0, 0, 10, 30, 100, 104, 200, 0],
                     [0, 0, 20, 40, 100, 104, 200, 0],
                     [0, 0, 50, 50, 0, 8, 200, 0],
                     [0, 0, 50, 50, 4, 4, 200, 0]], np.uint8)
    cropped = center_crop(Image.fromarray(grey), 2)
    np.testing.assert_array_equal(cropped,
                                  np.repeat(np.array([[25, 102], [50, 4]], np.uint8)[:, :, None], 3, axis=2))


def test_a_image_of_the_right_size_is_untouched():
    image = noise(24, 24)
    np.testing.assert_array_equal(center_crop(image, 24), np.asarray(image))


def test_images_are_made_rgb_before_they_are_resampled():
    """Resampling palette numbers, or transparent CMYK inks, would give colours that are not in the image."""
    image = noise(100, 80, 'P')
    np.testing.assert_array_equal(center_crop(image, 32), center_crop(image.convert('RGB'), 32))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_ignored_as_in_the_reference(orientation):
    plain = decode(encoded(noise(40, 30), 'JPEG'))
    turned = decode(encoded(noise(40, 30), 'JPEG', exif=_exif(orientation)))
    assert turned.size == (40, 30)
    np.testing.assert_array_equal(center_crop(turned, 16), center_crop(plain, 16))


def test_a_thread_of_a_image_is_refused_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(crop, 'MAX_PIXELS', 32 * 32 * 50)
    assert center_crop(noise(1, 50), 32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match='too long and thin to crop: 1x51 would grow to 32x1632'):
        center_crop(noise(1, 51), 32)


def test_flip_mirrors_left_and_right():
    array = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    np.testing.assert_array_equal(flip(array)[0], [[4, 5], [2, 3], [0, 1]])
    np.testing.assert_array_equal(flip(flip(array)), array)
    batch = np.stack([array, array + 100])
    np.testing.assert_array_equal(flip(batch)[1], flip(array) + 100)
