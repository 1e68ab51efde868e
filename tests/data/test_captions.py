"""Images with captions: from a folder to batches, and what is refused or left out."""
import json
import logging
import os

import numpy as np
import pytest
from caption_sets import Letters, image, lines, spell, write_captions
from image_files import encoded, noise

from lit_jax.data import image_sizes as image_sizes
from lit_jax.data.base import random_generator
from lit_jax.data.captions import Captioned, choose_caption, long_caption, record_captions
from lit_jax.data.crop import center_crop
from lit_jax.data.images import BadImage, decode, to_float
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_captioned, open_source
from lit_jax.runtime.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path / 'cache'))


def opened(path, **options):
    return open_captioned('captions', path=path, **{'image_size': 8, **options})


def source_of(path, **options):
    return open_source('captions', path=path,
                       **{'image_size': 8, 'tokenizer': Letters(), 'caption_tokens': 24, **options})


@pytest.fixture
def folder(tmp_path):
    return write_captions(tmp_path / 'pictures', **{
        'a.png': image(seed=1), 'a.txt': 'a cat\n', 'more/b.JPG': encoded(noise(20, 9), 'JPEG'),
        'more/b.txt': '\ufeffTwo dogs', '.hidden.png': b'', 'more/.x.txt': 'no'})


@pytest.fixture
def listed(tmp_path):
    """Two captions, one, and the other one; the second line is blank."""
    return write_captions(tmp_path / 'listed', **{
        'a.png': image(seed=1), 'more/b.png': image(seed=2), 'c.png': image(seed=3), 'captions.jsonl':
            lines({'image': 'a.png', 'long': 'a long caption', 'short': 'short'}) + '\n  \n'
            + lines({'file_name': './more/b.png', 'text': 'only'},
                    {'image': 'c.png', 'long': 'long alone', 'caption': ' '})})


def test_captions_stand_beside_the_images(folder):
    source = opened(folder)
    assert source.files == ['a.png', 'more/b.JPG']
    assert [source[i]['captions']
            for i in range(2)] == [('a cat',), ('Two dogs',)] == [source.captions(i) for i in range(2)]
    image = source[1]['image']
    np.testing.assert_array_equal(image,
                                  to_float(center_crop(decode((folder / 'more/b.JPG').read_bytes()), 8)))
    assert (source.spec.num_classes, source.spec.image_shape, source.class_names) == (0, (8, 8, 3), [])
    assert source.take([1, 0])['image'].shape == (2, 8, 8, 3)


def test_captions_stand_in_one_file(listed):
    source = opened(listed)
    assert dict(zip(source.files, source.texts, strict=True)) == {
        'a.png': ('short', 'a long caption'), 'c.png': ('long alone',), 'more/b.png': ('only',)}
    os.rename(listed / 'captions.jsonl', listed / 'metadata.jsonl')
    assert opened(listed).texts == source.texts and opened(listed).identity == source.identity


def test_the_identity_is_that_of_the_content(listed, folder, tmp_path):
    before = opened(folder).identity
    assert before['count'] == 2 and before != opened(listed).identity
    moved = tmp_path / 'elsewhere'
    os.rename(folder, moved)
    assert opened(moved).identity == before
    (moved / 'a.txt').write_text('a dog')
    assert opened(moved).identity != before


def test_elements_hold_tokens_of_both_captions(listed):
    source = source_of(listed)
    assert isinstance(source, Captioned) and len(source) == 3
    for index, (long, short) in enumerate([('a long caption', 'short'), ('long alone',) * 2, ('only',) * 2]):
        element = source[index]
        assert element.keys() == {'image', 'tokens', 'text_mask'}
        assert [spell(row) for row in element['tokens']] == [long, short]
        assert element['text_mask'].sum(axis=1).tolist() == [len(long) + 1, len(short) + 1]
        assert element['tokens'].shape == element['text_mask'].shape == (2, 24)


@pytest.mark.parametrize('ratio', [0.0, 0.6, 1.0])
def test_long_and_short_captions_are_mixed(listed, ratio):
    element = source_of(listed)[0]
    chosen = [spell(choose_caption(element, random_generator(0, 'augment', p), ratio)['tokens'])
              for p in range(2000)]
    # A deviation of 22 of 2000 at 0.6; five of them.
    assert abs(chosen.count('a long caption') - 2000 * ratio) <= (110 if 0 < ratio < 1 else 0)
    assert set(chosen) <= {'a long caption', 'short'}
    assert spell(long_caption(element)['tokens']) == 'a long caption'


def test_the_pipeline_gives_batches_of_one_caption_each(listed):
    options = {'global_batch': 4, 'seed': 1, 'augment': choose_caption}
    whole = make_pipeline(source_of(listed), **options)
    batch = whole.batch(3)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        'image': ((4, 8, 8, 3), np.float32), 'tokens': ((4, 24), np.int32), 'text_mask': ((4, 24), np.int32)}
    parts = [make_pipeline(source_of(listed), rows=rows, **options).batch(3) for rows in ([0, 1], [2, 3])]
    for name, array in batch.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    seen = {spell(row) for k in range(12) for row in whole.batch(k)['tokens']}
    assert seen == {'a long caption', 'short', 'long alone', 'only'}


def test_shapes_get_tokens_in_the_same_way():
    source = open_source('shapes', image_size=32, tokenizer=Letters(), caption_tokens=80)
    index = next(i for i in range(50) if len(source.captions(i)) == 2)
    short, long = source.captions(index)
    assert [spell(row) for row in source[index]['tokens']] == [long, short]
    batch = make_pipeline(source, global_batch=3, seed=0, augment=choose_caption).batch(0)
    assert batch['image'].shape == (3, 32, 32, 3) and batch['tokens'].shape == (3, 80)


def test_long_captions_are_cut_with_one_notice(listed, caplog):
    source = source_of(listed, caption_tokens=6)
    with caplog.at_level(logging.WARNING, 'lit_jax'):
        for index in (0, 1, 2, 0):
            assert source[index]['text_mask'].sum(axis=1).max() <= 6
    assert len(caplog.records) == 1 and 'more than 6 tokens' in caplog.text


# ------------------------------------------------------------------------------------------------------
# Buckets, damaged images, splits


SIZES = {'wide': (40, 10), 'tall': (10, 40), 'square': (16, 16), 'almost': (17, 16), 'damaged': None}


@pytest.fixture
def many(tmp_path):
    files = {}
    for name, size in SIZES.items():
        files |= {f'{name}.png': b'no image' if size is None else image(*size), f'{name}.txt': name}
    return write_captions(tmp_path / 'many', **files)


def test_buckets_are_known_from_the_headers(many, caplog, monkeypatch):
    source = opened(many, buckets=True, multiple=4)
    assert 'left out 1 images whose header does not give their size (damaged.png)' in caplog.text
    assert source.files == ['almost.png', 'square.png', 'tall.png', 'wide.png']
    shapes = [source.buckets[b] for b in source.bucket_of]
    assert shapes == [(8, 8), (8, 8), (16, 4), (4, 16)]
    assert [source[i]['image'].shape[:2] for i in range(4)] == shapes
    wrapped = source_of(many, buckets=True, multiple=4)
    batches = make_pipeline(wrapped, global_batch=2, seed=0, augment=choose_caption)
    assert {batches.batch(k)['image'].shape[1:3] for k in range(8)} == {(8, 8), (16, 4), (4, 16)}
    # A second time no header is read; where a file changed, all are.
    monkeypatch.setattr(image_sizes, 'header_size', lambda file: 1 / 0)
    np.testing.assert_array_equal(opened(many, buckets=True, multiple=4).bucket_of, source.bucket_of)
    (many / 'tall.png').write_bytes(image(11, 40))
    with pytest.raises(ZeroDivisionError):
        opened(many, buckets=True, multiple=4)


def test_a_damaged_image_is_replaced_with_its_caption_by_one_of_its_bucket(many):
    (many / 'almost.png').write_bytes(image(17, 16)[:60])
    source = opened(many, buckets=True, multiple=4)
    assert source[0]['captions'] == ('square',)
    np.testing.assert_array_equal(source[0]['image'], source[1]['image'])
    with pytest.raises(BadImage, match='almost.png'):
        source.load(0)
    with pytest.raises(BadImage, match='almost.png cannot be decoded'):
        opened(many, strict=True)[0]
    with pytest.raises(BadImage, match='damaged.png cannot be decoded: its header'):
        opened(many, strict=True, buckets=True)


def test_a_link_to_nothing_is_named(many):
    (many / 'tall.png').unlink()
    (many / 'tall.png').symlink_to('nowhere')
    with pytest.raises(UserError, match='tall.png cannot be read'):
        opened(many, buckets=True, multiple=4)


def test_nothing_but_damaged_images(tmp_path):
    folder = write_captions(tmp_path / 'bad', **{'a.png': b'', 'a.txt': 'a'})
    with pytest.raises(UserError, match='none of the images of .* can be decoded, e.g. a.png'):
        opened(folder, buckets=True, multiple=4)
    with pytest.raises(UserError, match='no image from example 0 on can be decoded'):
        opened(folder)[0]


def test_splits(tmp_path):
    write_captions(tmp_path / 'both',
                   **{'train/a.png': image(), 'train/a.txt': 'a', 'val/b.png': image(), 'val/b.txt': 'b'})
    assert opened(tmp_path / 'both').captions(0) == ('a',)
    assert opened(tmp_path / 'both', split='held_out').captions(0) == ('b',)
    write_captions(tmp_path / 'one', **{'a.png': image(), 'a.txt': 'a'})
    with pytest.raises(UserError, match='has no held-out images'):
        opened(tmp_path / 'one', split='held_out')


# ------------------------------------------------------------------------------------------------------
# Refused or left out


@pytest.fixture
def uneven(tmp_path):
    files = {f'alone_{i}.png': image() for i in range(7)} | {'orphan.txt': 'no image', 'empty.png': image(),
                                                             'empty.txt': ' \n'}
    return write_captions(tmp_path / 'uneven', **files, **{'a.png': image(), 'a.txt': 'a'})


def test_what_has_no_counterpart_is_left_out_with_one_line(uneven, caplog):
    source = opened(uneven)
    assert source.files == ['a.png'] and len(caplog.records) == 1
    assert ('left out 7 images without a caption (alone_0.png, alone_1.png, alone_2.png, alone_3.png, '
            'alone_4.png, ...); 1 captions without an image (orphan.txt); 1 empty captions (empty.png); 1 '
            'images with captions are left') in caplog.text
    with pytest.raises(UserError, match='7 images without a caption .*1 captions without an image'):
        opened(uneven, strict=True)
    (uneven / 'a.txt').unlink()
    with pytest.raises(UserError, match='has no image with a caption: 8 images without'):
        opened(uneven)


def test_strict_takes_empty_captions_for_none(tmp_path, caplog):
    folder = write_captions(tmp_path / 'x', **{'a.png': image(), 'a.txt': 'a', 'b.png': image(), 'b.txt': ''})
    assert len(opened(folder, strict=True)) == 1 and '1 empty captions (b.png)' in caplog.text


@pytest.mark.parametrize('text, message', [
    ('\n{"image": "a.png", "cap', r'line 2 of .*captions.jsonl is damaged, it is not JSON'),
    ('{"caption": "a"}', 'line 1 of .* does not say which image'),
    ('["a.png"]', 'does not say which image'),
    ('{"image": "a.png", "caption": "1"}\n\n{"image": "a.png", "caption": "2"}',
     'lines 1 and 3 of .* are both of a.png'),
    ('{"image": "a.png", "caption": 3}', r'line 1 of .*: "caption" is 3, expected text'),
    ('{"image": "b.png", "caption": "b"}', '1 images without a caption .a.png.; 1 captions without an image '
                                           '.b.png.'),
    (b'\xff\xfe\x00', 'is not text in UTF-8')])
def test_broken_lists_are_refused(text, message, tmp_path):
    folder = write_captions(tmp_path / 'x', **{'a.png': image(), 'captions.jsonl': text})
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_names_of_one_look_belong_together(tmp_path):
    """As macOS and others write an accented letter: NFD and NFC."""
    one, two = 'cafe\u0301', 'caf\u00e9'
    listed = lines({'image': f'{two}.png', 'caption': 'a cafe'})
    beside = write_captions(tmp_path / 'beside', **{f'{one}.png': image(), f'{two}.txt': 'a cafe'})
    for folder in (beside, write_captions(tmp_path / 'listed', **{f'{one}.png': image(),
                                                                  'captions.jsonl': listed})):
        source = opened(folder, strict=True)
        assert (source.files, source.texts) == ([f'{one}.png'], [('a cafe',)])
    both = write_captions(tmp_path / 'both', **{f'{name}.{end}': image() if end == 'png' else name
                                                for name in (one, two) for end in ('png', 'txt')})
    assert {file[:-4]: texts[0] for file, texts in zip(opened(both).files, opened(both).texts, strict=True)
            } == {one: one, two: two}


@pytest.mark.parametrize('files, message', [
    ({'a.jpg': image(), 'a.png': image(), 'a.txt': 'a'}, 'x: a.jpg and a.png share one caption file'),
    ({'a.png': image(), 'captions.jsonl': '', 'metadata.jsonl': ''},
     'has both captions.jsonl and metadata.jsonl'),
    ({'a.png': image()}, '1 images without a caption'),
    ({'a.txt': 'a'}, '1 captions without an image'),
    ({'readme.md': 'x'}, 'it has no images')])
def test_folders_that_cannot_be_meant_are_refused(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        opened(write_captions(tmp_path / 'x', **files))


@pytest.mark.parametrize('options, message', [
    ({'image_size': 10, 'multiple': 4}, 'image_size=10 does not fit: .*multiples of 4.*nearest: 8 and 12'),
    ({'tokenizer': None}, 'give the folder of a text encoder'),
    ({'caption_tokens': None}, 'the number of tokens'),
    ({'image_size': None}, 'say which to crop'), ({'channels': 1}, '3 channels'),
    ({'classes': 'list.txt'}, 'no classes'), ({'path': ''}, 'needs the folder'),
    ({'path': 'no/such/folder'}, 'does not exist'), ({'split': 'best'}, 'no split')])
def test_bad_requests_are_refused(options, message, folder):
    with pytest.raises(UserError, match=message):
        source_of(**{'path': folder, **options})


@pytest.mark.parametrize('name', ['digits', 'synthetic', 'imagenet2012', 'folder', 'latents'])
@pytest.mark.parametrize('options', [{'tokenizer': Letters()}, {'caption_tokens': 4}, {'buckets': True}])
def test_labels_take_neither_tokenizer_nor_buckets(name, options):
    with pytest.raises(UserError, match=f'{name} has labels, and neither captions nor buckets'):
        open_source(name, **options)


@pytest.mark.parametrize('record, plain, captions', [
    ({'short': 's', 'long': 'l'}, 'p', ('s', 'l')), ({'long': 'l'}, 'p', ('p', 'l')),
    ({'long': 'l'}, '', ('l',)), ({}, ' p ', ('p',)),
    ({'caption': None, 'text': 't'}, '', ('t',)), ({'prompt': 'p', 'sharegpt4v': 'x'}, '', ('p', 'x')),
    ({'caption': ' '}, '', ()), ({'caption': ''}, 'p', ('p',)), ({'width': 3}, '', ())])
def test_fields_of_records(record, plain, captions):
    assert record_captions(json.loads(json.dumps(record)), plain) == captions
