"""The cache of facts: what is damaged, or belongs to others, is made again."""
import numpy as np
import pytest

from lit_jax.runtime.kept import keep_facts


def kept(identity, value):
    return keep_facts('tests', identity, '.npy', make=lambda _: np.array(value), load=np.load, save=np.save)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path


def test_what_is_kept_is_not_made_again(folder):
    assert kept('a', [1, 2]).tolist() == kept('a', [3]).tolist() == [1, 2]
    assert kept('b', [4]).tolist() == [4]


def test_damaged_files_and_those_of_others_are_made_again(folder):
    kept('a', [1, 2]), kept('b', [3, 4])
    first, second = sorted(folder.rglob('*.npy'), key=lambda path: path.read_bytes()[:-32])
    for damaged in (second.read_bytes(), first.read_bytes()[:-1], b'', first.read_bytes()[:50]):
        first.write_bytes(damaged)
        assert kept('a', [5]).tolist() == [5]
        kept('a', [1, 2])
