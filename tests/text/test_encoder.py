"""Captions through a tiny encoder: batches of one size, and what is told about captions that were cut."""
import logging

import numpy as np
import pytest
from text_encoder_samples import ARCH, TEXT, random_params, tokenizer

from lit_jax.checkpoint.text_encoder_folder import TextEncoder
from lit_jax.models.t5 import T5Network
from lit_jax.runtime.errors import UserError
from lit_jax.text.encoder import encode_captions


@pytest.fixture(scope='module')
def encoder():
    config = {'id': 'tiny', 'provenance': {'sha256': '0'}}
    return TextEncoder(T5Network(ARCH), random_params(), config, tokenizer())


def test_features_do_not_depend_on_the_batch(encoder):
    captions = [*TEXT[:4], '', 'Two BLUE squares']
    whole = encode_captions(encoder, captions, 60, batch_size=6)
    assert whole.text.shape == (6, 60, 16) and whole.text.dtype == np.float32 and whole.mask.dtype == np.int32
    assert whole.mask[4].tolist() == [1] + [0] * 59 and whole.truncated == []
    before = encoder._encode._cache_size()
    parts = encode_captions(encoder, captions, 60, batch_size=4)
    # the last, shorter batch took no program of its own
    assert encoder._encode._cache_size() == before + 1
    np.testing.assert_allclose(parts.text, whole.text, atol=1e-5)
    np.testing.assert_array_equal(parts.mask, whole.mask)
    assert encode_captions(encoder, captions[:2], 60).text.shape == (2, 60, 16)


def test_features_are_those_of_the_network(encoder):
    tokens = encoder.tokenizer.encode(TEXT[:2], 24)
    want = encoder.network.apply(encoder.params, tokens.ids, tokens.mask)
    np.testing.assert_allclose(encode_captions(encoder, TEXT[:2], 24).text, want, atol=1e-5)


def test_cut_captions_are_told(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        features = encode_captions(encoder, ['a', TEXT[0]], 5)
    assert features.truncated == [1]
    assert '1 of 2 captions are longer than 4 tokens' in caplog.text and TEXT[0][:30] in caplog.text


@pytest.mark.parametrize('captions, batch_size, words',
                         [([], 2, 'no captions'), (['a'], 0, 'at least 1'), ('a', 1, 'list of texts')])
def test_wrong_calls_are_named(encoder, captions, batch_size, words):
    with pytest.raises(UserError, match=words):
        encode_captions(encoder, captions, 5, batch_size=batch_size)
