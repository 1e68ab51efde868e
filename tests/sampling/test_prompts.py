"""Prompts, seeds and sizes as a person writes them."""
import logging

import numpy as np
import pytest

from lit_jax.runtime.errors import UserError
from lit_jax.sampling import prompts
from lit_jax.text.tokenizer import Tokens

ARCH = {'input_size': (64, 64), 'patch': 2, 'caption_channels': 16}


def test_prompts_of_the_command_line_come_before_those_of_a_file(tmp_path, caplog):
    file = tmp_path / 'prompts.txt'
    file.write_bytes('\ufeffa red circle\r\n\r\n  двa 😀 circles \n\na line\u2028of one'.encode())
    with caplog.at_level(logging.WARNING, 'lit_jax'):
        assert prompts.collect_prompts(['first'],
                                       file) == ['first', 'a red circle', 'двa 😀 circles',
                                                 'a line\u2028of one']
    assert '2 blank lines are skipped' in caplog.text


def test_the_end_of_the_last_line_is_no_blank_line(tmp_path, caplog):
    (tmp_path / 'p.txt').write_text('one\ntwo\n')
    assert prompts.read_prompts(tmp_path / 'p.txt') == ['one', 'two'] and not caplog.text


def test_an_empty_prompt_is_drawn_with_a_notice(caplog):
    assert prompts.collect_prompts(['', 'a circle'], None) == ['', 'a circle']
    with pytest.raises(UserError, match=r"--prompt 'a .udcff' is not UTF-8"):
        prompts.collect_prompts(['a \udcff'], None)
    assert 'prompt 0 is empty: it draws without text' in caplog.text


@pytest.mark.parametrize('content, message',
                         [(b'', 'holds no prompt'), (b'\n  \n', 'holds no prompt'), (b'caf\xe9', 'not UTF-8'),
                          (None, 'no such file')])
def test_a_file_without_prompts_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'p.txt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts.collect_prompts([], tmp_path / 'p.txt')


def test_no_prompt_at_all_is_refused():
    with pytest.raises(UserError, match='--prompt='):
        prompts.collect_prompts([], None)


@pytest.mark.parametrize('seed, seeds, want',
                         [(None, None, [0]), (7, None, [7]), (None, '0,1, 2', [0, 1, 2])])
def test_seeds(seed, seeds, want):
    assert prompts.parse_seeds(seed, seeds) == want


@pytest.mark.parametrize('seed, seeds, message', [
    (1, '1', 'one of --seed'), (None, '1,a', 'whole numbers'), (None, '', 'whole numbers'),
    (None, '3,3', 'twice'), (-1, None, 'seed must be'), (None, '4294967296', 'seed must be')])
def test_wrong_seeds_are_refused(seed, seeds, message):
    with pytest.raises(UserError, match=message):
        prompts.parse_seeds(seed, seeds)


@pytest.mark.parametrize('text, want', [
    ('1024', (1024, 1024)), ('1024x768', (768, 1024)), (' 640 X 512', (512, 640)), ('512×640', (640, 512))])
def test_a_size_is_width_times_height(text, want):
    assert prompts.parse_size(text) == want


@pytest.mark.parametrize('text', ['', 'x', '1024x', 'big', '-16', '16.5', '1x2x3'])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match='WIDTHxHEIGHT'):
        prompts.parse_size(text)


@pytest.mark.parametrize('size, nearest', [
    ((1000, 1024), '1024x1008'), ((8, 16), '16x16'), ((0, 0), '16x16'), ((519, 521), '528x512')])
def test_a_size_that_cannot_be_drawn_names_the_nearest(size, nearest):
    with pytest.raises(UserError, match=f'multiples of 16 .*the nearest size is {nearest}'):
        prompts.latent_size(size, ARCH, 8)


def test_latent_sizes():
    assert prompts.latent_size((768, 1024), ARCH, 8) == (96, 128)
    assert prompts.latent_size(None, ARCH, 8) == (64, 64)


def test_large_images_are_computed_alone_and_small_ones_together():
    assert [prompts.default_group((side, side)) for side in (4, 8, 16, 32, 64, 128)] == [8, 8, 8, 2, 1, 1]


def test_unknown_tokens_are_told(caplog):
    prompts.say_unknown(['a 😀', 'fine'],
                        Tokens(np.array([[5, 2, 1, 0], [5, 6, 1, 0]]), np.array([[1, 1, 1, 0], [1, 1, 1, 0]]),
                               []))
    assert '1 of 2 tokens of "a 😀" are not in' in caplog.text and 'fine' not in caplog.text


def test_an_encoder_that_does_not_fit_lists_both():
    encoder = {'id': 'other', 'text_encoder': {'width': 12}}
    with pytest.raises(UserError,
                       match='(?s)width: 12 in T5, 16 in MODEL.*id: .other. in T5, .mine. in MODEL'):
        prompts.check_text_encoder(encoder, {'model': ARCH, 'text': {'encoder': 'mine'}}, 'T5', 'MODEL')


@pytest.mark.parametrize('text', [None, {'encoder': None}, {'encoder': 'other'}])
def test_a_model_that_does_not_know_its_encoder_takes_any_of_its_width(text):
    prompts.check_text_encoder({'id': 'other', 'text_encoder': {'width': 16}}, {'model': ARCH, 'text': text},
                               'T5', 'MODEL')
