"""JSON and lines from files: what is accepted, and one message that names file and place for the rest."""
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.runtime.errors import UserError, shown, shown_name
from lit_jax.runtime.json_file import parse_json, plain, read_json, read_lines, sealed, unsealed

SHAPE = {'latent': ({'scale': float}, None), 'names': [str], 'size?': int, 'files?': {str: {'bytes': int}}}
GOOD = {'latent': {'scale': 0.5}, 'names': ['a'], 'size': 3, 'files': {'x': {'bytes': 1}}}


@pytest.mark.parametrize('change', [{}, {'latent': None}, {'size': None}, {'more': 1}])
def test_right_shapes(tmp_path, change):
    path, content = tmp_path / 'config.json', GOOD | change
    path.write_bytes(b'\xef\xbb\xbf' + json.dumps(content).encode())     # a byte order mark is no content
    assert read_json(path, SHAPE) == content


@pytest.mark.parametrize('content, problem', [
    (GOOD | {'names': ['a', 1]}, r'names\[1\] is 1, expected a text'),
    (GOOD | {'latent': {'scale': float('nan')}}, 'latent.scale is nan, expected a finite number'),
    (GOOD | {'latent': {'scale': True}}, 'latent.scale is True'),
    (GOOD | {'size': 2.5}, 'size is 2.5, expected an integer'),
    (GOOD | {'files': {'x': {}}}, 'files.x.bytes is None'),
    ([], r'its content is \[\], expected an object')])
def test_wrong_shapes(tmp_path, content, problem):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f'config.json is damaged: {problem}'):
        read_json(path, SHAPE)


@pytest.mark.parametrize('data, problem', [
    (b'[' * 50_000, 'nested'), (b'[' * 70 + b']' * 70, 'nested'), (b'[' + b'9' * 5000 + b']', '5000 digits'),
    (b'1.' + b'1' * 5000, '5002 digits'), (b'\xff\xfe{\0', 'not text in UTF-8'), (b'"\\ud800"', 'unpaired'),
    (b'{', 'not JSON'), (b'', 'not JSON')])
def test_damaged(data, problem):
    with pytest.raises(UserError, match=f'^FILE is .*{problem}'):
        parse_json(data, 'FILE')


def test_missing_file(tmp_path):
    assert read_json(tmp_path / 'none.json', absent={}) == {}
    for name, target in (('dead.json', 'nowhere'), ('circular.json', 'circular.json')):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=f'{name} cannot be read'):
            read_json(tmp_path / name, absent={})
    with pytest.raises(UserError, match=r'none\.json cannot be read'):
        read_json(tmp_path / 'none.json')


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / 'captions.txt'
    path.write_bytes('one\u2028still one\u0085and\r\n\ntwo'.encode())
    assert read_lines(path) == ['one\u2028still one\u0085and', '', 'two']


@given(st.recursive(st.one_of(st.text(), st.binary(), st.integers(), st.floats(), st.none()),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=40))
def test_shown_values_are_short_and_printable(value):
    for text in (shown(value), shown_name(value)):
        assert text.isprintable() and len(text) <= 80


def test_a_number_too_long_to_print():
    assert shown(10 ** 5000) == 'a number of 16610 bits'


def test_plain_values_are_those_of_a_file():
    assert plain({'a': (1, 2), 3: None}) == {'a': [1, 2], '3': None}


def test_a_sealed_file_tells_damage_from_an_edit():
    content = sealed({'latent': {'scale': 0.18215}, 'names': ['é']})
    assert unsealed(json.loads(json.dumps(content)), 'FILE') == {'latent': {'scale': 0.18215}, 'names': ['é']}
    damaged = content | {'latent': {'scale': 0.18216}}
    with pytest.raises(UserError, match='FILE is damaged: .*own checksum .*delete its field "checksum"'):
        unsealed(damaged, 'FILE')
    assert unsealed({'latent': 1}, 'FILE') == {'latent': 1}      # of an earlier version, or edited
