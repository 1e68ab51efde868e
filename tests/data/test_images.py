"""Encoded images: what decodes, what does not and why, and what takes the place of a damaged one."""
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import encoded, noise
from PIL import Image

from lit_jax.data import images
from lit_jax.data.base import Spec
from lit_jax.data.crop import center_crop
from lit_jax.data.images import BadImage, ImageSource, decode, find_bad, to_float
from lit_jax.data.pipeline import make_pipeline
from lit_jax.runtime.errors import UserError

GOOD = [encoded(noise(20, 17, seed=i)) for i in range(8)]


class Images(ImageSource):
    """Images in memory; example i has label i mod 4."""

    def __init__(self, contents, **options):
        super().__init__(Spec(8, 3, 4, tuple('abcd')), **options)
        self.contents, self.reads = contents, []

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        self.reads.append(index)
        return self.contents[index], index % 4, f'image {index}'

    @property
    def identity(self):
        return {'name': 'memory', 'count': len(self)}


def with_bad(*numbers, **options):
    return Images([b'' if i in numbers else data for i, data in enumerate(GOOD)], **options)


def test_pixels_are_in_minus_one_to_one():
    values = to_float(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[255] == 1
    # Each of the 256 values survives the way back.
    np.testing.assert_array_equal(np.round((values + 1) * 127.5), np.arange(256))
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1.2e-7)


def test_what_is_ignored_of_images_is_said_once_and_counted(caplog):
    caplog.set_level('INFO', 'lit_jax')
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [encoded(noise(20, 17), 'JPEG', exif=turned), encoded(noise(20, 17, 'RGBA')), GOOD[0],
                encoded(noise(20, 17), 'JPEG', exif=b'Exif\0\0no such thing'),
                encoded(noise(20, 17, seed=1), 'JPEG', exif=turned)]
    source = Images(pictures)
    for _ in range(2):
        source.take(range(5))
    assert [record.getMessage() for record in caplog.records] == [
        'image 0: its EXIF orientation is ignored, as that of every image; more are counted, not shown',
        'image 1: its transparency is ignored, as that of every image; more are counted, not shown',
        'ignored, as everywhere: EXIF orientation of 2 images, transparency of 1 images']
    np.testing.assert_array_equal(source[0]['image'], to_float(center_crop(decode(pictures[0]), 8)))


def test_elements_keep_the_contract():
    source = Images(GOOD)
    element = source[5]
    assert element['image'].shape == (8, 8, 3) and element['image'].dtype == np.float32
    assert element['label'] == 1 and element['label'].dtype == np.int32
    np.testing.assert_array_equal(element['image'], to_float(center_crop(decode(GOOD[5]), 8)))
    batch = source.take([2, 5])
    assert batch['image'].flags['C_CONTIGUOUS'] and batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['image'][1], element['image'])
    np.testing.assert_array_equal(source.load(5)['image'], element['image'])
    for outside in (-1, 8):
        for read in (source.__getitem__, source.load, lambda i: source.take([i])):
            with pytest.raises(IndexError):
                read(outside)


def _cut(kind, **options):
    data = encoded(noise(64, 48), kind, **options)
    return data[:len(data) // 2]


@pytest.mark.parametrize('data, reason', [
    (b'', 'empty'), (b'hello', 'no image of a known format'), (bytes(1000), 'no image of a known format'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'no image of a known format'),
    (_cut('JPEG'), 'truncated'), (_cut('PNG'), 'truncated'), (_cut('GIF'), 'truncated|broken'),
    (_cut('BMP'), 'truncated'), (_cut('TIFF', compression='tiff_lzw'), '.'), (_cut('WEBP'), '.'),
    (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16))), 'more than 8 bits per channel'),
    (encoded(Image.fromarray(np.ones((9, 9), np.float32)), 'TIFF'), 'more than 8 bits per channel'),
])
def test_what_is_no_whole_image_says_why(data, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        decode(data)
    assert caught.value.args[0]


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    kinds = [encoded(noise(30, 20, mode), kind) for kind, mode in [
        ('JPEG', 'RGB'), ('JPEG', 'CMYK'), ('PNG', 'P'), ('PNG', 'RGB'), ('GIF', 'P'), ('BMP', 'RGB'),
        ('PPM', 'RGB'), ('WEBP', 'RGB')]]
    refused = 0
    for number in range(1500):
        data = np.frombuffer(kinds[number % len(kinds)], np.uint8).copy()
        places = rng.integers(0, min(len(data), (40, 300, 10**6)[number % 3]), 4)
        data[places] = rng.integers(0, 256, 4)
        try:
            decode(data.tobytes())
        except ValueError:
            refused += 1
    assert refused > 300


def test_the_next_readable_image_takes_the_place_of_a_damaged_one(caplog):
    source, whole = with_bad(2, 3, 7), Images(GOOD)
    with caplog.at_level(logging.WARNING, 'lit_jax'):
        for index, substitute in {2: 4, 3: 4, 7: 0, 1: 1, 4: 4}.items():
            element, expected = source[index], whole[substitute]
            np.testing.assert_array_equal(element['image'], expected['image'])
            assert element['label'] == expected['label']  # the label goes with the image
    assert source.bad == {f'image {i}': 'it is empty (0 bytes)' for i in (2, 3, 7)}
    assert len(caplog.records) == 3 and 'image 2 cannot be decoded: it is empty' in caplog.text
    source.reads.clear()
    source.take([2, 3])
    assert source.reads == [4, 4]  # known damage is not read again


def test_strict_stops_and_names_the_image():
    source = with_bad(3, strict=True)
    source.take([0, 1, 2])
    with pytest.raises(BadImage, match='image 3 cannot be decoded: it is empty'):
        source.take([2, 3])


def test_load_never_substitutes():
    with pytest.raises(BadImage, match='image 3'):
        with_bad(3).load(3)


def test_only_damaged_images_end_with_an_error():
    source = Images([b''] * 5)
    for _ in range(2):
        with pytest.raises(UserError,
                           match='no image from example 1 on can be decoded; the first .*image 1 '):
            source[1]


def test_a_long_row_of_damaged_images_is_not_skipped_in_silence(monkeypatch):
    monkeypatch.setattr(images, '_MAX_BAD_IN_A_ROW', 3)
    np.testing.assert_array_equal(with_bad(1, 2)[1]['image'], Images(GOOD)[3]['image'])
    with pytest.raises(UserError, match='no image from example 1 on'):
        with_bad(1, 2, 3)[1]


def test_many_damaged_images_are_counted_not_shown(monkeypatch, caplog):
    monkeypatch.setattr(images, '_MAX_WARNINGS', 2)
    source = with_bad(0, 2, 4, 6)
    with caplog.at_level(logging.WARNING, 'lit_jax'):
        source.take(range(8))
    assert len(caplog.records) == 2 and 'counted, not shown' in caplog.records[1].message
    assert len(source.bad) == 4


def test_threads_agree_about_damaged_images():
    source, barrier = with_bad(1, 2, 5), threading.Barrier(4)

    def read(_):
        barrier.wait()
        return source.take(range(8))['image']

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(4)))
    for result in results:
        np.testing.assert_array_equal(result, with_bad(1, 2, 5).take(range(8))['image'])
    assert sorted(source.bad) == ['image 1', 'image 2', 'image 5']


def test_hosts_see_one_stream_whatever_is_damaged():
    def batch(rows, threads):
        with iter(make_pipeline(with_bad(1, 2, 5), global_batch=4, seed=0, rows=rows,
                                threads=threads)) as batches:
            return [next(batches)['image'] for _ in range(5)]

    whole = batch(None, 1)
    for host in range(2):
        rows = np.arange(2) + 2 * host
        for part, full in zip(batch(rows, 3), whole, strict=True):
            np.testing.assert_array_equal(part, full[rows])


class Mislabelled(Images):
    def read(self, index):
        return self.contents[index], -1 if index == 2 else 4, f'image {index}'


@pytest.mark.parametrize('index, label', [(1, 4), (2, -1)])
def test_labels_outside_are_never_substituted(index, label):
    with pytest.raises(UserError, match=rf'image {index} has label {label}, outside 0\.\.3'):
        Mislabelled(GOOD)[index]


@pytest.mark.parametrize('threads', [1, 3])
def test_find_bad_lists_all_in_order(threads):
    steps = []
    source = with_bad(6, 1, 4, strict=True)
    found = find_bad(source, threads=threads, progress=lambda done, count: steps.append((done, count)))
    assert list(found.items()) == [(f'image {i}', 'it is empty (0 bytes)') for i in (1, 4, 6)]
    assert steps == [(8, 8)] and sorted(source.reads) == list(range(8))
