"""Some classes of a data set: the same examples, renumbered classes, whatever the data set is."""
import json

import numpy as np
import pytest
from image_files import write_folder
from latent_sets import moments_of, write_latents, write_tiny_vae
from tiny import tiny_recipe
from tiny_datasets import shapes

from lit_jax.data import label_index
from lit_jax.data.latents import open_latents
from lit_jax.data.prepare_imagenet import synsets
from lit_jax.data.sources import open_source
from lit_jax.data.subset import choose_classes, class_list
from lit_jax.data.tfds_images import TfdsSource
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime.errors import UserError
from lit_jax.training.setup import build_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def write_list(path, *names):
    path.write_text('\n'.join(names) + '\n')
    return str(path)


def test_sub_imagenet_is_the_documented_draw():
    drawn = sorted(np.random.default_rng(0).choice(1000, 100, replace=False).tolist())
    assert class_list('sub_imagenet') == tuple(synsets()[label] for label in drawn)
    assert len(set(drawn)) == 100


def test_a_folder(tmp_path):
    pets = write_folder(tmp_path / 'pets',
                        **dict.fromkeys(('a/1.png', 'b/1.png', 'b/2.png', 'c/1.png', 'd/1.png')))
    chosen = write_list(tmp_path / 'list.txt', 'd', 'b')
    whole, source = (open_source('folder', path=pets, image_size=8, classes=c) for c in ('', chosen))
    assert source.class_names == ['d', 'b'] and source.spec.num_classes == 2 and len(source) == 3
    batch = source.take([0, 1, 2])
    assert batch['label'].tolist() == [1, 1, 0] == [int(source[i]['label']) for i in range(3)]
    np.testing.assert_array_equal(batch['image'], whole.take([1, 2, 4])['image'])
    with pytest.raises(IndexError):
        source[3]
    assert source.identity['count'] == 3 and source.identity != whole.identity


def test_a_damaged_image_is_replaced_within_the_subset(tmp_path):
    pets = write_folder(tmp_path / 'pets', **dict.fromkeys(('a/1.png', 'b/1.png', 'c/1.png')))
    (pets / 'a' / '1.png').write_bytes(b'')
    source = open_source('folder', path=pets, image_size=8,
                         classes=write_list(tmp_path / 'list.txt', 'a', 'c'))
    np.testing.assert_array_equal(source[0]['image'], source[1]['image'])
    assert source[0]['label'] == 1


def test_tfds_reads_its_labels_once(tmp_path, cache, monkeypatch):
    shapes(tmp_path)
    chosen = write_list(tmp_path / 'list.txt', 'square')
    source = open_source('tfds:shapes', data_dir=tmp_path, image_size=8, classes=chosen)
    whole = open_source('tfds:shapes', data_dir=tmp_path, image_size=8)
    np.testing.assert_array_equal(source.take([0, 1])['image'], whole.take([1, 3])['image'])
    assert source.all_labels().tolist() == [0, 0]
    file = next((cache / 'labels').glob('*.npy'))
    monkeypatch.setattr(TfdsSource, 'read', lambda *_: pytest.fail('the labels were kept'))
    assert len(open_source('tfds:shapes', data_dir=tmp_path, image_size=8, classes=chosen)) == 2
    monkeypatch.undo()
    monkeypatch.setenv('LIT_JAX_CACHE', str(cache))
    file.write_bytes(file.read_bytes()[:100])
    assert len(open_source('tfds:shapes', data_dir=tmp_path, image_size=8, classes=chosen)) == 2


@pytest.mark.parametrize('with_labels', [True, False])
def test_cached_latents(tmp_path, with_labels, monkeypatch):
    """Also those whose notes have no labels yet."""
    write_latents(tmp_path / 'latents', bad=(2, 9))
    if not with_labels:
        for path in (tmp_path / 'latents' / 'shards').glob('*.json'):
            path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                        if key not in ('labels', 'checksum')}))
    else:
        monkeypatch.setattr(label_index, 'keep_facts', lambda *_, **__: pytest.fail('not needed'))
    chosen = write_list(tmp_path / 'list.txt', 'class 4', 'class 2')
    source = open_source('latents', path=tmp_path / 'latents', classes=chosen, num_classes=2)
    left = [4, 7, 12, 14, 17, 19]
    np.testing.assert_array_equal(source.take(range(6))['moments'], [moments_of(i) for i in left])
    assert source.take(range(6))['label'].tolist() == [0, 1, 1, 0, 1, 0]
    np.testing.assert_array_equal(source[2]['moments'], moments_of(12))
    assert source.metadata['classes'] == ['class 4', 'class 2'] and source.metadata['count'] == 6


def test_latents_made_of_the_classes_are_taken_as_they_are(tmp_path):
    """prepare_latents --classes, and then a recipe with data.classes: the classes are chosen once."""
    write_folder(tmp_path / 'pets', **dict.fromkeys(('a/1.png', 'b/1.png', 'b/2.png', 'c/1.png')))
    chosen = write_list(tmp_path / 'list.txt', 'a', 'c')
    vae = write_tiny_vae(tmp_path / 'vae')
    request = PrepareOptions(data='folder', vae=str(vae), out=str(tmp_path / 'latents'), image_size=8,
                      path=str(tmp_path / 'pets'), classes=chosen)
    prepare_latents(request)
    assert open_latents(tmp_path / 'latents').metadata['source']['count'] == 2
    source = open_source('latents', path=tmp_path / 'latents', classes=chosen, num_classes=2)
    assert len(source) == 2 and source.class_names == ['a', 'c'] and source.all_labels().tolist() == [0, 1]
    assert '--classes=' in request.command()


def test_a_recipe_passes_its_list_on(tmp_path):
    config = tiny_recipe()
    config.data.update({'name': 'digits', 'classes': write_list(tmp_path / 'list.txt', '3', '5'),
                        'num_classes': 2})
    source = build_source(config)
    assert source.spec.num_classes == 2 and set(source.all_labels().tolist()) == {0, 1}
    config.data.update({'name': 'synthetic', 'classes': 'sub_imagenet', 'num_classes': 7})
    assert build_source(config).spec.num_classes == 7


@pytest.mark.parametrize('names, num_classes, message', [
    (('a', 'z', 'y'), None,
     r'names 2 classes that the data set does not have \(z, y, ...\); its 2 classes: a, b'),
    (('a',), 3, 'names 1 classes, the recipe asks for 3; set --config.data.num_classes=1'),
    (('a', 'b', 'a'), None, 'names a more than once'), (('',), None, 'names no class')])
def test_lists_that_cannot_be(tmp_path, names, num_classes, message):
    pets = write_folder(tmp_path / 'pets', **dict.fromkeys(('a/1.png', 'b/1.png')))
    source = open_source('folder', path=pets, image_size=8)
    with pytest.raises(UserError, match=message):
        choose_classes(source, write_list(tmp_path / 'list.txt', *names), num_classes)


def test_a_list_that_is_not_there():
    with pytest.raises(UserError,
                       match=r'data.classes=mine.txt is neither a list of lit_jax '
                             r'\(sub_imagenet\) nor a text file'):
        class_list('mine.txt')
