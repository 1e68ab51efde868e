"""The .npz of a set: joined a part at a time, on a disk or in a bucket, and never half there."""
import os
import tracemalloc

import numpy as np
import pytest
from buckets import bucket  # noqa: F401

from lit_jax.runtime.paths import as_path
from lit_jax.sampling.stores import NpzStore, part_size

CARD = {'kind': 'pictures', 'seed': 0}


def pixels(part, count, side):
    return np.random.default_rng(part).integers(0, 256, (count, side, side, 3), np.uint8)


def fill(store, side, parts=None):
    assert store.begin() is not None
    for part in store.missing() if parts is None else parts:
        store.write(part, pixels(part, min(store.size, len(store.labels) - part * store.size), side))


def test_joining_needs_the_memory_of_a_part(tmp_path):
    store = NpzStore(tmp_path / 'set.npz', CARD, np.zeros(320, np.int32), (128, 128), 16)
    fill(store, 128)
    tracemalloc.start()
    store.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 16 * 128 * 128 * 3 <= (tmp_path / 'set.npz').stat().st_size / 4
    with np.load(tmp_path / 'set.npz') as arrays:
        images = arrays['arr_0']
    np.testing.assert_array_equal(images, np.concatenate([pixels(part, 16, 128) for part in range(20)]))


def test_a_kill_while_joining_costs_nothing(tmp_path, monkeypatch):
    store = NpzStore(tmp_path / 'set.npz', CARD, np.arange(40), (8, 8), 16)
    fill(store, 8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NpzStore, '_blocks', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        store.finish()
    assert sorted(os.listdir(tmp_path)) == ['set.json', 'set.npz.parts']
    (tmp_path / '.set.npz.partial').write_bytes(b'what a kill leaves')
    again = NpzStore(tmp_path / 'set.npz', CARD, np.arange(40), (8, 8), 16)
    assert again.begin() == 0 and again.missing() == []
    again.finish()
    assert sorted(os.listdir(tmp_path)) == ['set.json', 'set.npz'] and again.begin() is None


def test_a_kill_between_the_last_two_steps_is_tidied(tmp_path):
    store = NpzStore(tmp_path / 'set.npz', CARD, np.arange(40), (8, 8), 16)
    fill(store, 8)
    parts = {path.name: path.read_bytes() for path in (tmp_path / 'set.npz.parts').iterdir()}
    store.finish()
    (tmp_path / 'set.npz.parts').mkdir()
    for name, data in parts.items():
        (tmp_path / 'set.npz.parts' / name).write_bytes(data)
    assert store.begin() is None and sorted(os.listdir(tmp_path)) == ['set.json', 'set.npz']


def test_the_same_in_a_bucket(bucket, tmp_path):  # noqa: F811
    local = NpzStore(tmp_path / 'set.npz', CARD, np.arange(40), (8, 8), 16)
    fill(local, 8)
    local.finish()
    remote = NpzStore(as_path(bucket) / 'sets' / 'set.npz', CARD, np.arange(40), (8, 8), 16)
    fill(remote, 8, parts=[1])
    assert remote.missing() == [0, 2]
    fill(remote, 8)
    remote.finish()
    (as_path(bucket) / 'sets' / 'set.npz').copy(tmp_path / 'fetched.npz')
    for name in ('set.npz', 'fetched.npz'):
        with np.load(tmp_path / name) as arrays:
            np.testing.assert_array_equal(arrays['arr_1'], np.arange(40))
            np.testing.assert_array_equal(arrays['arr_0'],
                                          np.concatenate([pixels(k, n, 8)
                                                          for k, n in ((0, 16), (1, 16), (2, 8))]))
    assert not remote.folder.exists() and remote.begin() is None


def test_parts_are_whole_groups():
    assert [part_size(group) for group in (1, 7, 16, 100, 128, 200)] == [128, 133, 128, 200, 128, 200]
