"""Both forms of the tokenizer against transformers' T5 tokenizer, and what captions may hold."""
import pickle

import numpy as np
import pytest
from text_encoder_samples import TEXT, sentencepiece_model, tokenizer, tokenizer_json
from torchvision_shim import import_oracle

from lit_jax.runtime.errors import UserError
from lit_jax.text.tokenizer import FILES, Tokenizer, clean_caption

CORPUS = [*TEXT[::7], '', '   ', 'A RED circle', '  two\tblue\n\nsquares  ', 'ein gr\u00fcner Kreis',
          'x' * 300,
          '\u4e24\u4e2a\u84dd\u8272\u7684\u6b63\u65b9\u5f62', '\u0627\u0644\u062f\u0627\u0626\u0631\u0629',
          'e\u0301 \u00e9', '\U0001f389 party \U0001f468\u200d\U0001f469\u200d\U0001f467',
          '\ufb01ne \uff26\uff35\uff2c\uff2c width',
          'a\u00a0b\u3000c\u200bd', '\u2581 low line', 'tabs\t\tand ,punctuation!?', '1234567890 %$#@']


@pytest.fixture(scope='module', params=FILES)
def ours(request):
    return tokenizer(request.param)


@pytest.mark.peers
def test_ids_are_those_of_transformers(ours, tmp_path):
    transformers = import_oracle('transformers')
    (tmp_path / 'spiece.model').write_bytes(sentencepiece_model())
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path, extra_ids=0)
    want = theirs([clean_caption(caption) for caption in CORPUS], padding='max_length', max_length=24,
                  truncation=True, return_tensors='np')
    got = ours.encode(CORPUS, 24)
    for i, caption in enumerate(CORPUS):
        assert got.ids[i].tolist() == want['input_ids'][i].tolist(), caption
    assert np.array_equal(got.mask, want['attention_mask'])


def test_both_forms_give_the_same_ids():
    one, other = (tokenizer(file).encode(CORPUS, 400) for file in FILES)
    for i, caption in enumerate(CORPUS):
        assert one.ids[i].tolist() == other.ids[i].tolist(), caption
    assert tokenizer(FILES[0]).size == tokenizer(FILES[1]).size


def test_ids_mask_and_padding(ours):
    tokens = ours.encode(['', 'a red circle'], 20)
    assert tokens.ids.dtype == tokens.mask.dtype == np.int32 and tokens.ids.shape == tokens.mask.shape == (
        2, 20)
    assert tokens.ids[0].tolist() == [1] + [0] * 19 and tokens.mask[0].tolist() == [1] + [0] * 19
    count = tokens.mask[1].sum()
    assert tokens.mask[1].tolist() == [1] * count + [0] * (20 - count)
    assert tokens.ids[1, count - 1] == 1 and (tokens.ids[1, :count - 1]
                                              > 2).all() and (tokens.ids[1, count:] == 0).all()
    assert tokens.truncated == []


def test_long_captions_are_cut_and_told(ours):
    whole = ours.encode([TEXT[0]], 100)
    count = int(whole.mask.sum())
    exact = ours.encode([TEXT[0], '', TEXT[0] * 3], count)
    assert exact.truncated == [2]
    assert exact.ids[0].tolist() == whole.ids[0, :count].tolist()
    assert exact.ids[2, -1] == 1 and exact.mask[2].all()
    cut = ours.encode([TEXT[0]], 4)
    assert cut.ids[0].tolist() == [*whole.ids[0, :3], 1] and cut.truncated == [0]
    assert ours.encode(['a'], 1).ids.tolist() == [[1]]


def test_unknown_writing_becomes_unknown_tokens(ours):
    tokens = ours.encode(['\u6b63\u65b9\u5f62', '\U0001f389', '\ud83d'], 8)
    for row in range(3):
        assert 2 in tokens.ids[row] and 1 in tokens.ids[row]


def test_captions_are_cleaned(ours):
    assert clean_caption('  A Red\nCIRCLE\t') == 'a red\ncircle'
    assert clean_caption('\ud83d') == '?'
    tokens = ours.encode([' A Red CIRCLE ', 'a red circle'], 12)
    assert tokens.ids[0].tolist() == tokens.ids[1].tolist()


def test_no_captions(ours):
    assert ours.encode([], 5).ids.shape == (0, 5)


@pytest.mark.parametrize('captions, length, words',
                         [('one text', 5, 'list of texts'), ([None], 5, 'list of texts'),
                          (['a'], 0, 'length must be at least 1')])
def test_wrong_calls_are_named(ours, captions, length, words):
    with pytest.raises(UserError, match=words):
        ours.encode(captions, length)


def test_a_copy_for_another_process(ours):
    """Workers that read captions get the tokenizer through a pipe."""
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode(CORPUS, 30).ids.tolist() == ours.encode(CORPUS, 30).ids.tolist()


# ------------------------------------------------------------------------------------------------------
# Files


def test_json_comes_before_sentencepiece(tmp_path):
    (tmp_path / 'spiece.model').write_bytes(sentencepiece_model())
    assert Tokenizer.load(tmp_path).file == 'spiece.model'
    (tmp_path / 'tokenizer.json').write_bytes(tokenizer_json())
    assert Tokenizer.load(tmp_path).file == 'tokenizer.json'


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match='expected tokenizer.json or spiece.model'):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match='merges.txt is no tokenizer'):
        Tokenizer('merges.txt', b'')


@pytest.mark.parametrize('file', FILES)
def test_damaged_files_are_named(tmp_path, file):
    for content in (b'', b'\xff\xfe nothing', tokenizer(file).content[:200]):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=f'{file} is (damaged|not text in UTF-8)'):
            Tokenizer.load(tmp_path)


def test_a_panic_of_the_library_names_the_file(monkeypatch):
    """It is no Exception: `except Exception` lets it pass."""
    tokenizers = pytest.importorskip('tokenizers')

    class Panic(BaseException):
        pass

    def panic(*_):
        raise Panic('index out of bounds')

    content = tokenizer_json()
    monkeypatch.setattr(tokenizers, 'Tokenizer', type('Panicking', (), {'from_str': staticmethod(panic)}))
    with pytest.raises(UserError, match='models/t5/tokenizer.json is damaged.*index out of bounds'):
        Tokenizer('tokenizer.json', content, 'models/t5/tokenizer.json')


def test_tokenizers_of_other_models_are_refused():
    content = tokenizer_json().replace(b'</s>', b'<end>')
    with pytest.raises(UserError, match='</s> is not there, expected 1'):
        Tokenizer('tokenizer.json', content)
