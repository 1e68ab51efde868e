"""A folder of images: its classes, its order, its splits, and everything that can be wrong with it."""
import logging
import os
import random
import shutil

import numpy as np
import pytest
from buckets import Store, bucket  # noqa: F401
from image_files import encoded, noise, write_folder
from PIL import Image

from lit_jax.data.crop import center_crop
from lit_jax.data.folder import open_folder
from lit_jax.data.images import find_bad, to_float
from lit_jax.data.sources import open_source
from lit_jax.runtime.errors import UserError

ANY = {'image_size': 8, 'channels': None, 'num_classes': None}
NAMES = ('dog/z.png', 'cat/b.jpg', 'cat/a.PNG', 'cat/deep/er/c.webp', 'Zebra/1.JPEG')


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / 'pets', **dict.fromkeys(NAMES))


def open_any(path, **options):
    return open_folder(path, **{'asked': ANY, **options})


def test_classes_are_the_subfolders_sorted_and_deeper_folders_belong_to_them(pets):
    source = open_any(pets)
    assert source.class_names == ['Zebra', 'cat', 'dog'] and source.spec.num_classes == 3
    assert source.files == ['Zebra/1.JPEG', 'cat/a.PNG', 'cat/b.jpg', 'cat/deep/er/c.webp', 'dog/z.png']
    assert source.labels.tolist() == [0, 1, 1, 1, 2] and len(source) == 5
    for index, file in enumerate(source.files):
        element = source[index]
        with Image.open(pets / file) as image:
            np.testing.assert_array_equal(element['image'], to_float(center_crop(image, 8)))
        assert element['label'] == source.labels[index]


def test_loose_images_have_no_classes(tmp_path):
    source = open_any(write_folder(tmp_path, **{'b.png': None, 'a.png': None}))
    assert source.files == ['a.png', 'b.png'] and source.class_names == [''] and source.spec.num_classes == 1
    assert source.take([0, 1])['label'].tolist() == [0, 0]


def test_the_order_does_not_depend_on_the_order_in_which_files_were_written(tmp_path):
    names = [f'{c}/{i}.png' for c in 'abc' for i in range(12)]
    opened = []
    for seed in range(2):
        random.Random(seed).shuffle(names)
        opened.append(open_any(write_folder(tmp_path / str(seed), **dict.fromkeys(names, b'x'))))
    assert opened[0].files == opened[1].files and opened[0].identity == opened[1].identity
    (tmp_path / '1' / 'b' / '3.png').rename(tmp_path / '1' / 'b' / '33.png')
    assert open_any(tmp_path / '1').identity != opened[0].identity


def test_other_files_are_ignored_counted_and_listed(pets, caplog):
    write_folder(pets, **{'cat/notes.txt': b'x', 'dog/more.TXT': b'x', 'list.csv': b'x', 'dog/README': b'x',
                          '.DS_Store': b'x', 'dog/._z.png': b'x', '.thumbs/a.png': b'x',
                          '__MACOSX/cat/a.png': b'x'})
    with caplog.at_level(logging.INFO, 'lit_jax'):
        source = open_any(pets)
    assert len(source) == 5 and source.class_names == ['Zebra', 'cat', 'dog']
    assert 'ignored 4 files that are not images: 2 .txt, ' in caplog.text
    assert '1 .csv' in caplog.text and '1 without a suffix' in caplog.text


def test_damaged_images_are_replaced_or_stop(pets):
    (pets / 'cat' / 'a.PNG').write_bytes(b'')
    (pets / 'dog' / 'z.png').write_bytes(encoded(noise(50, 50))[:900])
    source = open_any(pets)
    np.testing.assert_array_equal(source[1]['image'], source[2]['image'])
    assert source[4]['label'] == 0  # the last one is followed by the first
    assert list(source.bad) == [str(pets / 'cat' / 'a.PNG'), str(pets / 'dog' / 'z.png')]
    assert find_bad(open_any(pets)) == source.bad
    with pytest.raises(UserError, match='cat/a.PNG cannot be decoded: it is empty'):
        open_any(pets, strict=True)[1]


def test_a_file_that_is_gone_stops_the_run(pets):
    source = open_any(pets)
    (pets / 'cat' / 'b.jpg').unlink()
    with pytest.raises(UserError, match='cat/b.jpg cannot be read: No such file'):
        source[2]
    assert not source.bad


def test_links_are_followed_but_not_in_circles(pets, tmp_path):
    linked = tmp_path / 'linked'
    linked.mkdir()
    (linked / 'tiger').symlink_to(pets / 'cat')
    (linked / 'lion').symlink_to(pets / 'dog')
    (pets / 'dog' / 'self').symlink_to(pets / 'dog')
    (pets / 'dog' / 'up').symlink_to(tmp_path)
    source = open_any(linked)
    assert source.files == ['lion/z.png', 'tiger/a.PNG', 'tiger/b.jpg', 'tiger/deep/er/c.webp']
    assert source[0]['image'].shape == (8, 8, 3)


@pytest.mark.parametrize('held_out', ['held_out', 'validation', 'val', 'test'])
def test_splits(tmp_path, held_out):
    write_folder(tmp_path, **{'train/a/1.png': None, 'train/b/2.png': None, f'{held_out}/b/3.png': None})
    train, other = open_any(tmp_path), open_any(tmp_path, split='held_out')
    assert train.class_names == other.class_names == ['a', 'b']
    assert train.files == ['a/1.png',
                           'b/2.png'] and other.files == ['b/3.png'] and other.labels.tolist() == [1]


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, **{'train/1.png': None, 'plane/2.png': None})
    assert open_any(tmp_path).class_names == ['plane', 'train']


def test_splits_beside_other_folders_are_not_taken_for_classes(tmp_path):
    write_folder(tmp_path, **{'train/a/1.png': None, 'val/a/2.png': None, 'old/3.png': None})
    with pytest.raises(UserError, match=r'has splits \(train, val\) and other folders \(old\)'):
        open_any(tmp_path)


def test_held_out_images_need_a_place_and_known_classes(pets, tmp_path):
    with pytest.raises(UserError, match=f'no held-out images. Put the training images into {pets / "train"}'):
        open_any(pets, split='held_out')
    write_folder(tmp_path / 's', **{'train/a/1.png': None, 'val/b/2.png': None})
    with pytest.raises(UserError, match='val has classes that .*train has not: b'):
        open_any(tmp_path / 's', split='held_out')
    with pytest.raises(UserError, match="no split 'test'; known: train, held_out"):
        open_any(pets, split='test')


@pytest.mark.parametrize('files, message', [
    ({'cat/a.png': None, 'dog/notes.txt': b'x'}, 'these classes of .* have no images: dog. Fill or delete'),
    ({'cat/a.png': None, 'b.png': None}, r'loose images \(b.png, ...\) and folders with images \(cat, ...\)'),
    ({'a.txt': b'x', 'cat/b.pdf': b'x'},
     r'no images in .* \(other files: 1 .txt, 1 .pdf\). Known suffixes: .*\.jpg'),
])
def test_folders_that_cannot_be_meant(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        open_any(write_folder(tmp_path, **files))


def test_an_empty_class_is_named(pets):
    for number in range(12):
        (pets / f'empty{number:02}').mkdir()
    with pytest.raises(UserError, match='have no images: empty00, .*empty09 and 2 more'):
        open_any(pets)


def test_places_that_are_no_folders(pets, tmp_path):
    with pytest.raises(UserError, match='needs the folder of the images: --config.data.path=FOLDER'):
        open_any('')
    with pytest.raises(UserError, match=f'{tmp_path}/nowhere does not exist; data.path should be'):
        open_any(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='z.png is a file; data.path should be'):
        open_any(pets / 'dog' / 'z.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='there are no images in'):
        open_any(tmp_path / 'empty')


@pytest.mark.parametrize('locked', ['', 'cat', 'cat/deep'])
def test_folders_that_may_not_be_read(pets, monkeypatch, locked):
    """Root may read everything, so the refusal of the system is imitated."""
    scandir, listdir = os.scandir, os.listdir

    def refuse_in(original):
        def call(path='.'):
            if os.path.abspath(path) == os.path.abspath(pets / locked):
                raise PermissionError(13, 'Permission denied', os.fspath(path))
            return original(path)
        return call

    monkeypatch.setattr(os, 'scandir', refuse_in(scandir))
    monkeypatch.setattr(os, 'listdir', refuse_in(listdir))
    with pytest.raises(UserError, match=f'the folder {pets / locked} cannot be read: Permission denied'):
        open_any(pets)


@pytest.mark.parametrize('asked, message', [
    ({'image_size': None}, 'say which to crop them to'),
    ({'channels': 4}, 'images with 3 channels, .* asks for 4'),
    ({'num_classes': 1000}, 'has 3 classes, the recipe asks for 1000; set --config.data.num_classes=3')])
def test_recipes_that_do_not_fit(pets, asked, message):
    with pytest.raises(UserError, match=message):
        open_any(pets, asked={**ANY, **asked})


def test_by_name(pets, monkeypatch):
    source = open_source('folder', path=pets, image_size=16, channels=3, num_classes=3)
    assert source.spec.image_shape == (16, 16, 3) and source.take([0, 4])['image'].shape == (2, 16, 16, 3)
    monkeypatch.setenv('HOME', str(pets.parent))
    assert open_source('folder', path='~/pets', image_size=16).files == source.files
    (pets / 'dog' / 'z.png').write_bytes(b'')
    with pytest.raises(UserError, match='z.png cannot be decoded'):
        open_source('folder', path=pets, image_size=16, strict=True)[4]


def test_a_relative_folder_stays_where_it_was(pets, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = open_any('pets')
    monkeypatch.chdir('/')
    assert source[0]['label'] == 0


def test_a_folder_in_a_bucket(pets, bucket):  # noqa: F811
    for path in pets.rglob('*.*'):
        Store.objects[f'bucket/pets/{path.relative_to(pets)}'] = path.read_bytes()
    local, remote = open_any(pets), open_any(f'{bucket}/pets')
    assert remote.files == local.files and remote.identity == local.identity
    np.testing.assert_array_equal(remote.take(range(5))['image'], local.take(range(5))['image'])
    del Store.objects['bucket/pets/cat/b.jpg']
    with pytest.raises(UserError, match='gs://bucket/pets/cat/b.jpg cannot be read'):
        remote[2]
    Store.broken = OSError('the network is down')
    with pytest.raises(UserError, match='gs://bucket/pets/cat/a.PNG cannot be reached: the network '
                                        'is down'):
        remote[1]
    with pytest.raises(UserError, match='gs://bucket/pets cannot be reached'):
        open_any(f'{bucket}/pets')


def test_a_bucket_that_is_not_there(bucket):  # noqa: F811
    with pytest.raises(UserError, match='no such bucket'):
        open_any('gs://elsewhere/pets')
    with pytest.raises(UserError, match='gs://bucket/nowhere does not exist'):
        open_any(f'{bucket}/nowhere')


def test_names_that_are_no_utf8(tmp_path):
    folder = write_folder(tmp_path / 'odd', **{'cat/a.png': None})
    try:
        shutil.copy(folder / 'cat' / 'a.png', os.fsencode(folder / 'cat') + b'/\xff.png')
    except OSError:
        pytest.skip('this file system knows only UTF-8 names')
    source = open_any(folder)
    assert len(source) == 2 and source[1]['label'] == 0 and len(source.identity['sha256']) == 64
