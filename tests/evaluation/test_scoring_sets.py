"""Sets of images as evaluate.py reads them: in blocks, from stored and deflated files, and what is
refused."""
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from lit_jax.evaluation.sets import FirstOf, open_set
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.npz_reader import Npz


def image_set(count=40, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def write(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_blocks_are_the_rows_of_the_file(tmp_path, save):
    images = image_set()
    found = open_set(write(tmp_path / 'set.npz', save, arr_0=images, arr_1=np.arange(40)))
    assert (found.count, found.shape, found.card) == (40, (8, 8), None)
    np.testing.assert_array_equal(found.labels, np.arange(40))
    blocks = list(found.blocks([range(3, 10), range(10, 11), range(32, 40)]))
    np.testing.assert_array_equal(np.concatenate(blocks), images[[*range(3, 11), *range(32, 40)]])
    np.testing.assert_array_equal(next(FirstOf(found, 5).blocks([range(5)])), images[:5])
    assert FirstOf(found, 5).sha256 == found.sha256 and len(found.sha256) == 64


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_block_at_a_time_is_in_memory(tmp_path, save):
    write(tmp_path / 'set.npz', save, arr_0=np.zeros((2000, 64, 64, 3), np.uint8) +
          np.arange(64, dtype=np.uint8)[:, None])
    tracemalloc.start()
    total = sum(len(block)
                for block in open_set(tmp_path
                                      / 'set.npz').blocks(range(i, i + 50) for i in range(0, 2000, 50)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2000 and peak < 10 * 50 * 64 * 64 * 3


@pytest.mark.parametrize('array, message', [
    (image_set().astype(np.float32), r'float32 \[40, 8, 8, 3\]; expected uint8(.|\n)*np.clip\(127.5'),
    (image_set().transpose(0, 3, 1, 2), r'channels are first: save images.transpose\(0, 2, 3, 1\)'),
    (image_set()[0], r'uint8 \[8, 8, 3\]; expected'),
    (image_set()[..., :1], r'expected uint8 \[N, H, W, 3\]'),
    (image_set(0), 'arr_0 is empty'), (image_set().astype(np.int64), 'int64'),
    (np.array([{}, 1], dtype=object), 'pickled objects'), (np.asfortranarray(image_set()), 'Fortran order')])
def test_wrong_arrays_are_refused(tmp_path, array, message):
    np.savez(tmp_path / 'set.npz', arr_0=array)
    with pytest.raises(UserError, match=message):
        open_set(tmp_path / 'set.npz')


def test_a_file_without_images_says_what_it_has(tmp_path):
    with pytest.raises(UserError, match='expected arr_0(.|\n)*it has images, labels'):
        open_set(write(tmp_path / 'set.npz', images=image_set(), labels=np.arange(3)))
    (tmp_path / 'text.npz').write_text('no zip file')
    for name, message in (('absent.npz', 'does not exist'), ('text.npz', 'not a whole .npz'),
                          ('set.txt', 'does not exist')):
        with pytest.raises(UserError, match=message):
            open_set(tmp_path / name)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('keep', [0, 30, 0.5, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, save, keep):
    path = write(tmp_path / 'set.npz', save, arr_0=image_set())
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match='cut off'):
        open_set(path)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_a_damaged_byte_is_found_when_the_file_is_read(tmp_path, save):
    path = write(tmp_path / 'set.npz', save, arr_0=image_set())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    found = open_set(path)
    with pytest.raises(UserError, match='arr_0 is damaged or cut off'):
        list(found.blocks([range(0, 20)]))


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, image_set())
    with zipfile.ZipFile(tmp_path / 'set.npz', 'w') as archive:
        archive.writestr('arr_0.npy', file.getvalue()[:-100])
    with pytest.raises(UserError, match='is damaged or cut off'):
        open_set(tmp_path / 'set.npz')


def test_small_arrays_are_read_whole(tmp_path):
    write(tmp_path / 'a.npz', a=np.arange(6.0).reshape(2, 3), text=np.asarray('words'))
    with Npz(tmp_path / 'a.npz') as file:
        np.testing.assert_array_equal(file.array('a'), np.arange(6.0).reshape(2, 3))
        assert str(file.array('text')) == 'words'
        with pytest.raises(UserError, match='has no array b, only a, text'):
            file.array('b')


def test_the_card_beside_a_set_is_its_own(tmp_path):
    write(tmp_path / 'set.npz', arr_0=image_set())
    card = {'kind': 'pictures', 'pictures': {'count': 40}}
    (tmp_path / 'set.json').write_text(json.dumps(card))
    assert open_set(tmp_path / 'set.npz').card == card
    (tmp_path / 'set.json').write_text(json.dumps({'kind': 'pictures', 'pictures': {'count': 50}}))
    with pytest.raises(UserError, match='card of 50 images(.|\n)*contains 40'):
        open_set(tmp_path / 'set.npz')
    (tmp_path / 'set.json').write_text('{"notes": "mine"}')
    assert open_set(tmp_path / 'set.npz').card is None


# ------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_of_png_files_in_the_order_of_names(tmp_path):
    images = image_set(12)
    for i in (3, 0, 11, *range(1, 3), *range(4, 11)):
        Image.fromarray(images[i]).save(tmp_path / f'{i:06d}_class{i % 4:04d}.png')
    (tmp_path / 'card.json').write_text('{}')
    (tmp_path / '.hidden.png').write_bytes(b'')
    found = open_set(tmp_path)
    assert (found.count, found.shape) == (12, (8, 8))
    np.testing.assert_array_equal(found.labels, np.arange(12) % 4)
    np.testing.assert_array_equal(np.concatenate(list(found.blocks([range(2, 5), range(9, 12)]))),
                                  images[[2, 3, 4, 9, 10, 11]])
    before = found.sha256
    Image.fromarray(images[0]).save(tmp_path / '000005_class0001.png')
    assert open_set(tmp_path).sha256 != before


def test_grey_files_are_taken_and_others_refused(tmp_path):
    Image.fromarray(image_set(1)[0, :, :, 0]).save(tmp_path / 'a.png')
    assert next(open_set(tmp_path).blocks([range(1)])).shape == (1, 8, 8, 3)
    Image.fromarray(image_set(1, side=9)[0]).save(tmp_path / 'b.png')
    for look in (lambda: open_set(tmp_path).sha256, lambda: list(open_set(tmp_path).blocks([range(2)]))):
        with pytest.raises(UserError, match='b.png has 9x9 pixels, a.png has 8x8'):
            look()
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])
    with pytest.raises(UserError, match='b.png cannot be read'):
        list(open_set(tmp_path).blocks([range(2)]))
    Image.fromarray(image_set(1)[0]).save(tmp_path / 'c.jpg')
    with pytest.raises(UserError, match='1 images in lossy formats'):
        open_set(tmp_path)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='no PNG files'):
        open_set(tmp_path / 'empty')
