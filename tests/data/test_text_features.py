"""Cached latents with text features: what comes out, and what is refused."""
import json

import ml_dtypes
import numpy as np
import pytest
from caption_latent_sets import (
    LENGTH,
    SHAPES,
    WIDTH,
    bucket_of,
    moments_of,
    null_of,
    texts_of,
    write_caption_latents,
)
from hypothesis import given
from hypothesis import strategies as st
from latent_sets import write_latents

from lit_jax.data.base import stack
from lit_jax.data.caption_latents import open_caption_latents
from lit_jax.data.captions import choose_caption, long_caption
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_source
from lit_jax.data.text_features import check_text, count_tokens, pack_features, read_null, unpack_features
from lit_jax.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    write_caption_latents(tmp_path / 'latents')
    return tmp_path / 'latents'


def padded(text: np.ndarray) -> np.ndarray:
    return np.concatenate([text, np.zeros((LENGTH - len(text), WIDTH), ml_dtypes.bfloat16)])


@given(tokens=st.integers(0, 9), width=st.integers(1, 7), offset=st.integers(0, 5), seed=st.integers(0, 60))
def test_features_survive_in_the_bits_of_bfloat16(tokens, width, offset, seed):
    text = np.random.default_rng(seed).standard_normal((9, width),
                                                       np.float32) * np.float32(10.0 ** (seed - 30))
    data = bytes(offset) + pack_features(text, tokens)
    assert len(data) == offset + 2 * tokens * width
    out = unpack_features(data, offset, tokens, width)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(out, text[:tokens].astype(ml_dtypes.bfloat16))


def test_tokens_stand_before_the_padding():
    assert [count_tokens(np.array(mask)) for mask in ([1, 1, 0], [0, 0], [1])] == [2, 0, 1]
    with pytest.raises(ValueError, match='before its padding'):
        count_tokens(np.array([0, 1]))


def test_elements_are_what_was_written(folder):
    source = open_caption_latents(folder)
    assert len(source) == 20 and (source.spec.image_size, source.spec.channels,
                                  source.spec.num_classes) == (4, 3, 0)
    assert source.buckets == ((2, 8), (4, 4),
                              (8, 2)) and source.bucket_of.tolist() == [bucket_of(i, 3) for i in range(20)]
    for i in range(20):
        element, texts = source[i], texts_of(i)
        np.testing.assert_array_equal(element['moments'], moments_of(i, SHAPES[bucket_of(i, 3)]))
        assert element['moments'].dtype == np.float32 and element['text'].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(element['text'], [padded(texts[0]), padded(texts[-1])])
        assert element['text_mask'].dtype == np.int32
        np.testing.assert_array_equal(element['text_mask'],
                                      [np.arange(LENGTH) < len(text) for text in (texts[0], texts[-1])])


def test_half_precision_is_of_the_moments(tmp_path):
    write_caption_latents(tmp_path / 'half', dtype='float16')
    element = open_caption_latents(tmp_path / 'half')[4]
    np.testing.assert_array_equal(element['moments'],
                                  moments_of(4, SHAPES[bucket_of(4, 3)]).astype(np.float16))
    np.testing.assert_array_equal(element['text'][0], padded(texts_of(4)[0]))


def test_batches_hold_one_caption_and_one_shape(folder):
    source = open_caption_latents(folder)
    pipeline = make_pipeline(source, global_batch=4, seed=1, augment=choose_caption)
    for k in range(12):
        batch = pipeline.batch(k)
        assert batch['moments'].shape[1:3] in source.buckets and batch['moments'].dtype == np.float32
        assert batch['text'].shape == (4, LENGTH, WIDTH) and batch['text'].dtype == ml_dtypes.bfloat16
        assert batch['text_mask'].shape == (4, LENGTH) and batch['text_mask'].dtype == np.int32
        for row, index in enumerate(pipeline.indices(4 * k + np.arange(4))):
            assert any(np.array_equal(batch['text'][row], padded(text)) for text in texts_of(int(index)))
    np.testing.assert_array_equal(long_caption(source[1])['text'], padded(texts_of(1)[0]))


def test_stacks_keep_what_labels_had():
    batch = stack([{'image': np.ones(2, np.float64), 'label': 1, 'text': np.ones(2, ml_dtypes.bfloat16),
                    'tokens': np.ones(2, np.int64)}])
    assert {name: array.dtype for name, array in batch.items()} == {
        'image': np.float32, 'label': np.int32, 'text': ml_dtypes.bfloat16, 'tokens': np.int32}


def test_squares_have_no_buckets(tmp_path):
    write_caption_latents(tmp_path / 'squares', shapes=((8, 8),))
    source = open_source('caption_latents', path=tmp_path / 'squares', image_size=4, channels=3,
                         caption_tokens=LENGTH)
    assert source.buckets == () and source.bucket_of is None and source.take([3, 4])['moments'].shape == (
        2, 4, 4, 6)
    with pytest.raises(UserError, match='are all square: set --config.data.buckets=False'):
        open_source('caption_latents', path=tmp_path / 'squares', buckets=True)


def test_the_empty_caption_has_features_of_its_padding_too(folder):
    text, mask = open_caption_latents(folder).null_features
    assert text.dtype == ml_dtypes.bfloat16 and mask.dtype == np.int32
    for got, want in zip((text, mask), null_of(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_damaged_or_missing_null_is_refused(folder):
    metadata, path = json.loads((folder / 'metadata.json').read_text()), folder / 'null_text.bin'
    data = path.read_bytes()
    for content in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='null_text.bin is not as it was written'):
            read_null(folder, metadata['text'])
    path.unlink()
    with pytest.raises(UserError, match='null_text.bin cannot be read: No such file'):
        open_caption_latents(folder).null_features  # noqa: B018


def test_other_text_encoders_are_named(folder):
    metadata = open_caption_latents(folder).metadata
    check_text(folder, metadata, encoder='made-up t5', sha256='ef' * 32, tokens=LENGTH, width=WIDTH)
    check_text(folder, metadata, encoder=None)
    with pytest.raises(UserError) as caught:
        check_text(folder, metadata, 'in the model x', encoder='t5-xxl', sha256='00', tokens=300, width=4096)
    for line in (f'{folder} are not those in the model x',
                 "encoder: 'made-up t5' in the data set, 't5-xxl' in the model x", 'ef' * 32,
                 f'tokens: {LENGTH} in the data set, 300', f'width: {WIDTH} in the data set, 4096',
                 'prepare_latents.py --text_encoder'):
        assert line in str(caught.value), line


@pytest.mark.parametrize('options, message', [
    ({'image_size': 8}, 'image_size: 4 in the data set, 8 in the recipe'),
    ({'channels': 4}, 'channels: 3 in the data set, 4'),
    ({'caption_tokens': 300}, f'tokens: {LENGTH} in the data set, 300'),
    ({'split': 'held_out'}, "of the split 'train'"),
    ({'buckets': False}, 'have 3 shapes: set --config.data.buckets=True'),
    ({'path': 'no/folder'}, 'caption.*--text_encoder'),
    ({'classes': 'x'}, 'no classes')])
def test_wrong_requests_are_refused(options, message, folder):
    with pytest.raises(UserError, match=message):
        open_source('caption_latents', **{'path': folder, 'buckets': True, **options})


def test_each_kind_of_latents_is_opened_as_such(folder, tmp_path):
    write_latents(tmp_path / 'labels')
    with pytest.raises(UserError,
                       match='holds latents, not caption_latents: take --config.data.name=latents'):
        open_caption_latents(tmp_path / 'labels')
    with pytest.raises(UserError,
                       match='holds caption_latents, not latents: take --config.data.name=caption_latents'):
        open_source('latents', path=folder)


def test_a_record_of_another_size_is_refused(folder, monkeypatch):
    source = open_caption_latents(folder)
    record = source._records[3]
    for wrong in (record[:-1], record + b'0', record[:8], b'\xff' * len(record)):
        monkeypatch.setattr(source, '_records', {3: wrong})
        with pytest.raises(UserError, match=f'latents 3 of .* cannot be read: its {len(wrong)} bytes'):
            source[3]
