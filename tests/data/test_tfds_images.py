"""Image data sets of tfds: read without TensorFlow, decoded here, and a clear word for all that can be
missing."""
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_files import encoded, noise
from tiny_datasets import build, image, numbered, shapes

from lit_jax.data.crop import center_crop
from lit_jax.data.images import decode, to_float
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_source
from lit_jax.data.tfds_images import open_tfds
from lit_jax.runtime.errors import UserError

ANY = {'image_size': 8, 'channels': None, 'num_classes': None}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tfds')
    shapes(folder)
    return folder


@pytest.fixture
def own_dir(data_dir, tmp_path):
    """A copy of the data set to be spoiled."""
    shutil.copytree(data_dir / 'shapes', tmp_path / 'shapes')
    return tmp_path


def open_any(name, data_dir, **options):
    return open_tfds(name, data_dir=data_dir, **{'asked': ANY, **options})


def test_elements_are_the_stored_bytes_decoded_and_cropped_here(data_dir):
    source = open_any('shapes', data_dir)
    assert len(source) == 5 and source.class_names == ['circle',
                                                       'square'] and source.spec.image_shape == (8, 8, 3)
    for i in range(5):
        expected = to_float(center_crop(decode(image(i).getvalue()), 8))
        np.testing.assert_array_equal(source[i]['image'], expected)
        assert source[i]['label'] == i % 2 and source[i]['label'].dtype == np.int32
    assert source.read(3)[2] == 'example 3 of shapes/1.0.0 train (3.jpg)'


def test_held_out_is_validation_before_test(data_dir, own_dir):
    held_out = open_any('shapes', data_dir, split='held_out')
    assert held_out.split == 'validation' and len(held_out) == 3
    np.testing.assert_array_equal(held_out[0]['image'],
                                  to_float(center_crop(decode(image(10).getvalue()), 8)))
    with pytest.raises(UserError, match="no split 'test' here; known: train, held_out"):
        open_any('shapes', data_dir, split='test')


def test_it_works_without_tensorflow_and_without_the_code_of_the_data_set(data_dir):
    code = f'''
import sys
from lit_jax.data.sources import open_source
source = open_source('tfds:shapes', data_dir={str(data_dir)!r}, image_size=16)
print(source.take(range(5))['image'].shape)
assert 'tensorflow' not in sys.modules and 'tiny_datasets' not in sys.modules
'''
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '(5, 16, 16, 3)\n' and 'OpenCV' not in done.stderr


def test_threads_read_the_same_stream(data_dir):
    source = open_any('shapes', data_dir)
    with iter(make_pipeline(source, global_batch=4, seed=0, threads=4)) as batches:
        read = [next(batches) for _ in range(8)]
    alone = make_pipeline(source, global_batch=4, seed=0)
    for k, batch in enumerate(read):
        np.testing.assert_array_equal(batch['image'], alone.batch(k)['image'])


def test_names_configurations_and_versions(tmp_path):
    features = {'image': tfds.features.Image()}
    for config, version in (('small', '1.0.0'), ('small', '1.9.0'), ('small', '1.10.0'), ('large', '2.0.0')):
        build(tmp_path, 'views', features, {'train': [{'image': image(1)}]}, config=config, version=version)
    opened = {name: open_any(name, tmp_path).identity['name']
              for name in ('views/small', 'views/small:1.9.0', 'views/large')}
    assert opened == {'views/small': 'views/small/1.10.0', 'views/small:1.9.0': 'views/small/1.9.0',
                      'views/large': 'views/large/2.0.0'}
    with pytest.raises(UserError, match='has these configurations .*: large, small. Name one: '
                                        '.*=tfds:views/large'):
        open_any('views', tmp_path)
    with pytest.raises(UserError, match='views/small:3.0.0 is not prepared: there is no version of it in'):
        open_any('views/small:3.0.0', tmp_path)
    for wrong in ('', 'views:', 'views/', '../views', 'a b', 'hugging:face'):
        with pytest.raises(UserError, match='names no tfds data set'):
            open_any(wrong, tmp_path)


def test_the_folder_of_a_version_may_be_given_itself(data_dir, own_dir):
    shutil.move(own_dir / 'shapes' / '1.0.0', own_dir / 'shapes' / 'here')
    assert len(open_any('shapes', own_dir / 'shapes' / 'here')) == 5
    with pytest.raises(UserError, match='is a data set, but not faces; data.name and data.path differ'):
        open_any('faces', data_dir / 'shapes' / '1.0.0')


def test_images_without_labels(tmp_path):
    build(tmp_path, 'plain', {'picture': tfds.features.Image(shape=(None, None, 1), encoding_format='png')},
          {'train': [{'picture': image(i, 'PNG', 'L')} for i in range(3)]})
    source = open_any('plain', tmp_path)
    assert source.class_names == [''] and [int(source[i]['label']) for i in range(3)] == [0, 0, 0]
    assert source[0]['image'].shape == (8, 8, 3)
    with pytest.raises(UserError, match='plain/1.0.0 has no held_out or validation or val or test split .*: '
                                        'train'):
        open_any('plain', tmp_path, split='held_out')


def test_plain_numbers_as_labels_need_a_number_of_classes(tmp_path):
    features = {'image': tfds.features.Image(), 'label': tfds.features.Scalar(np.int64)}
    build(tmp_path, 'counts', features, {'train': numbered(4) + numbered(5) + numbered(-1)})
    with pytest.raises(UserError, match='plain numbers as labels: say how many classes'):
        open_any('counts', tmp_path)
    source = open_any('counts', tmp_path, asked={**ANY, 'num_classes': 5})
    assert source[0]['label'] == 4 and source.class_names == list('01234')
    for index, label in ((1, 5), (2, -1)):
        with pytest.raises(UserError,
                           match=rf'example {index} of counts/1.0.0 train has label {label}, outside 0\.\.4'):
            source[index]


@pytest.mark.parametrize('features, example, message', [
    ({'left': tfds.features.Image(), 'right': tfds.features.Image()},
     lambda: {'left': image(1), 'right': image(2)}, 'several images in an example; .* features: left, right'),
    ({'x': tfds.features.Tensor(shape=(2,), dtype=np.float32)}, lambda: {'x': np.zeros(2, np.float32)},
     'no images'),
    ({'image': tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format='png')},
     lambda: {'image': image(1, 'PNG', 'I;16')}, 'uint16; expected uint8'),
])
def test_data_sets_of_something_else(tmp_path, features, example, message):
    build(tmp_path, 'other', features, {'train': [example()]})
    with pytest.raises(UserError, match=message):
        open_any('other', tmp_path)


def test_damaged_images_are_replaced_and_named(tmp_path):
    good = encoded(noise(30, 20), 'JPEG')
    contents = [good, good[:300], b'', good]
    build(tmp_path, 'broken', {'image': tfds.features.Image(), 'filename': tfds.features.Text()},
          {'train': [{'image': io.BytesIO(data), 'filename': f'{i}.jpg'} for i, data in enumerate(contents)]})
    source = open_any('broken', tmp_path)
    np.testing.assert_array_equal(source[1]['image'], source[3]['image'])
    assert list(source.bad) == [f'example {i} of broken/1.0.0 train ({i}.jpg)' for i in (1, 2)]
    with pytest.raises(UserError,
                       match=r'example 2 of broken/1.0.0 train \(2.jpg\) cannot be decoded: it is empty'):
        open_any('broken', tmp_path, strict=True)[2]


def test_what_is_not_prepared_says_how_to(data_dir, tmp_path):
    with pytest.raises(UserError) as caught:
        open_source('imagenet2012', data_dir=tmp_path, image_size=256)
    for part in (str(tmp_path / 'imagenet2012'), 'https://image-net.org', 'ILSVRC2012_img_train.tar',
                 '156 GB free',
                 f'python -m lit_jax.data.prepare_imagenet --archives=FOLDER_OF_THE_TARS '
                 f'--data_dir={tmp_path}', '--config.data.path=FOLDER'):
        assert part in str(caught.value)
    with pytest.raises(UserError) as caught:
        open_source('tfds:flowers', data_dir=data_dir, image_size=256)
    for part in ("tfds.builder('flowers'", "file_format='array_record').download_and_prepare()",
                 'TensorFlow'):
        assert part in str(caught.value)
    os.rename(shutil.copytree(data_dir / 'shapes', tmp_path / 'shapes') / '1.0.0',
              tmp_path / 'shapes/1.0.0.incompleteXY')
    with pytest.raises(UserError, match='shapes is not prepared'):
        open_any('shapes', tmp_path)


def _shard(folder):
    return next(folder.glob('*train.array_record*'))


def _garbage_info(folder):
    (folder / 'dataset_info.json').write_text('{"name": ')


def _no_features(folder):
    (folder / 'features.json').unlink()


def _other_format(folder):
    path = folder / 'dataset_info.json'
    path.write_text(path.read_text().replace('array_record', 'tfrecord'))


@pytest.mark.parametrize('damage, message', [
    (lambda folder: _shard(folder).unlink(), 'is incomplete: .*train.array_record-00000-of-00001 is missing'),
    (_garbage_info, 'is no complete tfds data set'), (_no_features, 'is no complete tfds data set'),
    (_other_format, 'stored as tfrecord; random access needs ArrayRecord. Prepare it again'),
])
def test_damaged_data_sets_do_not_open(own_dir, damage, message):
    damage(own_dir / 'shapes' / '1.0.0')
    with pytest.raises(UserError, match=message):
        open_any('shapes', own_dir)


def _cut(shard):
    shard.write_bytes(shard.read_bytes()[:shard.stat().st_size // 2])


def _zeros(shard):
    data = bytearray(shard.read_bytes())
    data[70:1000] = bytes(930)
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize('damage', [_cut, _zeros, lambda shard: shard.write_bytes(b'')])
def test_a_damaged_file_is_an_error_and_no_damaged_image(own_dir, damage):
    damage(_shard(own_dir / 'shapes' / '1.0.0'))
    with pytest.raises(UserError, match='example 0 of shapes/1.0.0 train cannot be read: .* is damaged; '
                                        'prepare'):
        open_any('shapes', own_dir)[0]


def test_buckets_are_refused_with_a_way_out():
    with pytest.raises(UserError, match='gs://bucket/data: ArrayRecord files are read from a disk. Copy the '
                                        'data set'):
        open_any('shapes', 'gs://bucket/data')


def test_recipes_that_do_not_fit(data_dir):
    with pytest.raises(UserError, match='shapes/1.0.0 has 2 classes, the recipe asks for 1000'):
        open_source('tfds:shapes', data_dir=data_dir, image_size=8, num_classes=1000)
    with pytest.raises(UserError, match='shapes/1.0.0 holds images of any size: say which'):
        open_source('tfds:shapes', data_dir=data_dir)


def test_identity_tells_data_sets_apart(data_dir, tmp_path):
    again = shapes(tmp_path)
    one, other = open_any('shapes', data_dir), open_any('shapes', again)
    assert one.identity == other.identity != open_any('shapes', data_dir, split='held_out').identity
    assert one.identity['name'] == 'shapes/1.0.0' and one.identity['count'] == 5
