"""Tar shards: random access equals what was written, the index is kept, and damage is named."""
import gzip
import io
import json
import os
import random
import tarfile

import numpy as np
import pytest
from caption_sets import Letters, image, spell, write_captions, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, noise
from PIL import Image

from lit_jax.data import tar_shards
from lit_jax.data.captions import choose_caption
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


def record(**fields) -> str:
    return json.dumps(fields)


@pytest.fixture
def folder(tmp_path):
    """Two shards of five images together; the first has members in every order, and others that are none of
    ours."""
    root = tmp_path / 'shards'
    write_tar(root / '00001.tar', **{'4.webp': encoded(noise(9, 9), 'WEBP'), '4.txt': 'four'})
    write_tar(root / '00000.tar', **{
        'd/0.txt': 'zero', 'd/0.JPG': encoded(noise(30, 10), 'JPEG'),
        '1.json': record(long='one is long', short='one'), '1.cls': b'7',
        '1.png': image(10, 30), './2.png': image(12, 12, 2), '2.json': record(caption='ignored: text'),
        '2.txt': 'two', '2.seg.png': b'no', 'd/1.png': image(11, 12),
        'd/1.json': record(width=3, sharegpt4v='three'), '.hidden.png': b'no'})
    return root


def test_names_with_dots_are_taken_up_to_the_last_one(tmp_path, caplog):
    caplog.set_level('INFO', 'lit_jax')
    write_tar(tmp_path / 'a.tar', **{
        'photo 2.0.png': image(), 'photo 2.0.txt': 'two', 'photo.png': image(), 'photo.txt': 'one',
        'v1.5/x.y.jpg': image(), 'v1.5/x.y.json': record(caption='three'), '4.jpg': image(), '4.txt': 'four',
        '4.seg.png': image(), '4.seg.json': '{"caption"', '4.note.txt': 'no caption', '4.cls': '7',
        '5.1.png': image(), '6.2.txt': 'six', '7.json': record(width=3)})
    source = opened(tmp_path)
    assert [source.captions(i)[0] for i in range(len(source))] == ['two', 'one', 'three', 'four']
    assert '1 images without a caption (a.tar: 5.1); 1 captions without an image (a.tar: 6.2)' in caplog.text
    assert 'ignored 5 members' in caplog.text and '2 *.seg.*' in caplog.text and '1 .cls' in caplog.text


def test_tar_files_joined_end_to_end_are_read_to_the_last(tmp_path):
    parts = [write_tar(tmp_path / f'{name}.tar', **{f'{name}.png': image(seed=i), f'{name}.txt': name})
             for i, name in enumerate('abc')]
    whole = b''.join(part.read_bytes() for part in parts)
    for part in parts:
        part.unlink()
    (tmp_path / 'all.tar').write_bytes(whole)
    source = opened(tmp_path)
    assert [source.captions(i) for i in range(3)] == [('a',), ('b',), ('c',)]
    np.testing.assert_array_equal(source[2]['image'], to_float(center_crop(decode(image(seed=2)), 8)))
    for end in (b'no tar', b'x' * 600):
        (tmp_path / 'all.tar').write_bytes(whole + end)
        with pytest.raises(UserError, match='all.tar is damaged'):
            opened(tmp_path)


def test_names_of_one_look_belong_together(tmp_path):
    """As macOS and others write an accented letter."""
    write_tar(tmp_path / 'a.tar', **{'caf\u00e9.png': image(), 'cafe\u0301.txt': 'one',
                                     'e\u0301.png': image(), 'e\u0301.txt': 'two', '\u00e9.txt': 'three'})
    source = opened(tmp_path)
    assert [source.captions(i) for i in range(len(source))] == [('one',), ('two',)]


CAPTIONS = [('zero',), ('one', 'one is long'), ('ignored: text',), ('three',), ('four',)]


def test_members_are_read_in_any_order(folder):
    source = opened(folder)
    assert [source.captions(i) for i in range(len(source))] == CAPTIONS
    with tarfile.open(folder / '00000.tar') as tar:
        for index, name in enumerate(('d/0.JPG', '1.png', './2.png', 'd/1.png')):
            np.testing.assert_array_equal(source[index]['image'],
                                          to_float(center_crop(decode(tar.extractfile(name).read()), 8)))
    assert source[4]['captions'] == ('four',) and source.read(4)[2].endswith('00001.tar: 4')




def test_one_tar_file_is_a_data_set_too(folder):
    assert len(opened(folder / '00001.tar')) == 1


def test_batches_and_buckets(folder):
    source = open_source('captions', path=folder, image_size=8, tokenizer=Letters(), caption_tokens=20,
                         buckets=True, multiple=4)
    assert [source.buckets[b] for b in source.bucket_of] == [(4, 12), (12, 4), (8, 8), (8, 8), (8, 8)]
    pipeline = make_pipeline(source, global_batch=2, seed=0, augment=choose_caption, threads=2)
    with iter(pipeline) as batches:
        for k, batch in zip(range(10), batches, strict=False):
            assert batch['image'].shape[1:3] in source.buckets
            np.testing.assert_array_equal(batch['tokens'], pipeline.batch(k)['tokens'])
            assert all(spell(row) in {text for pair in CAPTIONS for text in pair} for row in batch['tokens'])


def test_the_index_is_kept_for_as_long_as_the_file_stays_as_it_is(folder, tmp_path, monkeypatch, caplog):
    caplog.set_level('INFO', 'lit_jax')
    first = opened(folder)
    assert caplog.text.count('scanning') == 2
    again = opened(folder)
    assert caplog.text.count('scanning') == 2 and again.identity == first.identity
    assert again[1]['captions'] == first[1]['captions']
    write_tar(folder / '00001.tar', **{'5.png': image(), '5.txt': 'five'})
    assert opened(folder).captions(4) == ('five',) and caplog.text.count('scanning') == 3
    for path in (tmp_path / 'cache' / 'tar_shards').iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert len(opened(folder)) == 5 and 'it is made again' in caplog.text
    assert opened(folder).identity != first.identity


def test_without_room_for_the_index_it_still_opens(folder, tmp_path, caplog):
    (tmp_path / 'cache').write_text('a file where the folder should be')
    assert len(opened(folder)) == 5 and 'cannot be written' in caplog.text


def test_the_identity_does_not_depend_on_the_place(folder, tmp_path):
    before = opened(folder).identity
    os.rename(folder, tmp_path / 'moved')
    assert opened(tmp_path / 'moved').identity == before


names = st.text(st.characters(codec='utf-8', exclude_characters='\0/.', exclude_categories=('Cs',)),
                min_size=1, max_size=120)


@settings(max_examples=40, deadline=None)
@given(keys=st.lists(names, min_size=1, max_size=8, unique=True),
       folder=st.sampled_from(['', 'd/', 'x' * 120 + '/']),
       format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
       text=st.text(min_size=1).filter(str.strip), shuffle=st.integers())
def test_any_names_in_any_format(tmp_path_factory, keys, folder, format, text, shuffle):
    members = {f'{folder}{key}.{end}': content for key in keys
               for end, content in (('png', b'x'), ('txt', f'{key} {text}'))}
    members = dict(random.Random(shuffle).sample(sorted(members.items(), key=str), len(members)))
    path = tmp_path_factory.mktemp('tar') / 'a.tar'
    try:
        write_tar(path, format, **members)
    except UnicodeEncodeError:
        return
    index = tar_shards.scan_tar(path)
    expected = [name[:-4] for name in members if name.endswith('.png')]
    assert index.keys == expected and not index.alone and not index.orphans


def test_header_sizes_are_those_of_the_images(tmp_path):
    """Also where the header is far from the beginning: a JPEG with a colour profile of 200 kB."""
    big = io.BytesIO()
    noise(33, 21).save(big, 'JPEG', icc_profile=bytes(200_000))
    write_tar(tmp_path / 'a.tar',
              **{'0.jpg': big.getvalue(), '0.txt': 'a', '1.png': image(5, 7), '1.txt': 'b', '2.png': b'',
                 '2.txt': 'c'})
    assert tar_shards.scan_tar(tmp_path / 'a.tar').table[:, 6:].tolist() == [[33, 21], [5, 7], [0, 0]]
    assert Image.open(big).size == (33, 21)


def test_a_damaged_image_is_replaced_with_its_caption(tmp_path):
    write_tar(tmp_path / 'a.tar',
              **{'0.png': image()[:50], '0.txt': 'zero', '1.png': image(), '1.txt': 'one'})
    source = opened(tmp_path)
    assert source[0]['captions'] == source[1]['captions'] == ('one',)
    with pytest.raises(BadImage, match='a.tar: 0 cannot be decoded'):
        source.load(0)


# ------------------------------------------------------------------------------------------------------
# Left out or refused


def test_what_has_no_counterpart_is_left_out_with_one_line(tmp_path, caplog):
    write_tar(tmp_path / 'a.tar', **{
        '0.png': image(), '1.txt': 'a text', '2.json': record(caption='a caption'), '3.json': record(width=3),
        '4.png': image(), '4.txt': ' ', '5.png': image(), '5.json': record(caption=''), '6.png': image(),
        '6.json': record(width=1), '7.png': image(), '7.txt': 'seven'})
    source = opened(tmp_path)
    assert len(source) == 1 and source[0]['captions'] == ('seven',) and len(caplog.records) == 1
    assert ('2 images without a caption (a.tar: 0, a.tar: 6); 2 captions without an image (a.tar: 1, a.tar: '
            '2); 2 empty captions (a.tar: 4, a.tar: 5); 1 images') in caplog.text
    with pytest.raises(UserError, match='2 images without a caption'):
        opened(tmp_path, strict=True)
    write_tar(tmp_path / 'a.tar', **{'0.png': image()})
    with pytest.raises(UserError, match='has no image with a caption: 1 images without'):
        opened(tmp_path)


@pytest.mark.parametrize('members, message', [
    ({'0.png': b'', '0.txt': b'\xff'}, r'the caption of .*a.tar: 0 cannot be read: .*utf-8'),
    ({'0.png': b'', '0.json': '{"capt'},
     'the caption of .*a.tar: 0 is damaged, it is not JSON: Unterminated'),
    ({'0.png': b'', '0.json': '[1]'}, 'a.tar: 0 is damaged: its content is .1., expected an object'),
    ({'0.png': b'', '0.json': '{"long": 3}'}, '"long" is 3, expected text'),
    ({'0.png': b'', '0.txt': 'a', '1.json': '{"capt'}, 'the JSON of 1 is damaged, it is not JSON'),
    ({'0.png': b'', '0.jpg': b'', '0.txt': 'a'}, 'has two members .*or two images')])
def test_members_that_cannot_be_read_are_named(members, message, tmp_path):
    write_tar(tmp_path / 'a.tar', **members)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_the_same_member_twice(tmp_path):
    path = write_tar(tmp_path / 'a.tar', **{'0.png': image(), '0.txt': 'a'})
    with tarfile.open(path, 'a') as tar:
        info = tarfile.TarInfo('0.txt')
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match="two members '0.txt'"):
        opened(tmp_path)


def test_every_cut_of_a_tar_file_is_noticed(tmp_path):
    path = write_tar(tmp_path / 'a.tar',
                     **{'0.png': image(), '0.txt': 'a', '1.png': image(seed=1), '1.txt': 'b'})
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 for member in tar)  # of the last member, padded
    assert len(data) > end + 512
    for length in (*range(0, end + 512, 128), end, end + 511):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match='a.tar is damaged, cut off, or no plain tar file'):
            tar_shards.scan_tar(path)
    path.write_bytes(data[:end + 512])  # one block of the end mark is enough
    assert len(tar_shards.scan_tar(path).keys) == 2


def test_damaged_headers_are_noticed(tmp_path):
    path = write_tar(tmp_path / 'a.tar',
                     **{'0.png': image(), '0.txt': 'a', '1.png': image(seed=1), '1.txt': 'b'})
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    for offset in offsets:
        for byte in (0, 100, 124, 148, 156):  # name, mode, size, checksum, type
            broken = bytearray(data)
            broken[offset + byte] ^= 0x15
            path.write_bytes(broken)
            with pytest.raises(UserError, match='a.tar is damaged'):
                tar_shards.scan_tar(path)


def test_other_files_are_refused_by_name(tmp_path):
    plain = write_tar(tmp_path / 'x' / 'a.tar', **{'0.png': image(), '0.txt': 'a'}).read_bytes()
    packed = tmp_path / 'packed'
    packed.mkdir()
    (packed / 'a.tar.gz').write_bytes(gzip.compress(plain))
    with pytest.raises(UserError, match='has compressed tar files .a.tar.gz'):
        opened(packed)
    (packed / 'b.tar').write_bytes(gzip.compress(plain))
    with pytest.raises(UserError, match='b.tar is damaged, cut off, or no plain tar file'):
        opened(packed)
    write_captions(tmp_path / 'x', **{'loose.png': image()})
    with pytest.raises(UserError, match='both tar shards .a.tar, ....* and loose images .loose.png'):
        opened(tmp_path / 'x')
    with pytest.raises(UserError, match='nothing.tar'):
        opened(tmp_path / 'nothing.tar')


def test_a_file_that_shrinks_while_it_is_read(folder):
    source = opened(folder)
    (folder / '00001.tar').write_bytes(b'')
    with pytest.raises(UserError, match='00001.tar is shorter than when it was opened'):
        source[4]
    (folder / '00001.tar').unlink()
    with pytest.raises(UserError, match='00001.tar cannot be read: No such file'):
        source[4]
