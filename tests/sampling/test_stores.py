"""The .npz of a set: joined a part at a time, on a disk or in a bucket, and never half there."""
import io
import os
import tracemalloc

import numpy as np
import pytest
from buckets import bucket  # noqa: F401

from lit_jax.evaluation.sets import open_set
from lit_jax.report.grids import save_png
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path
from lit_jax.sampling.stores import FolderStore, NpzStore, part_size

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


# ------------------------------------------------------------------------------------------------------
# Damage


def whole(store, side):
    """Makes what the store misses; returns {file: bytes} of all."""
    fill(store, side)
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if path.suffix == '.npy'}


def begun_again(tmp_path):
    return NpzStore(tmp_path / 'set.npz', CARD, np.arange(20), (4, 4), 8)


def test_any_damaged_byte_of_a_part_is_found_and_the_part_made_again(tmp_path):
    files = whole(begun_again(tmp_path), 4)
    folder, name = tmp_path / 'set.npz.parts', '000000008-000000016.npy'
    for at in range(0, len(files[name]), 31):
        broken = bytearray(files[name])
        broken[at] ^= 1 << at % 8
        (folder / name).write_bytes(broken)
        again = begun_again(tmp_path)
        assert again.begin() == 8 and again.missing() == [1], at
    assert whole(again, 4) == files


def test_a_part_in_the_place_of_another_is_made_again(tmp_path):
    files = whole(begun_again(tmp_path), 4)
    one, other = '000000000-000000008.npy', '000000008-000000016.npy'
    (tmp_path / 'set.npz.parts' / other).write_bytes(files[one])
    assert begun_again(tmp_path).missing() == [1]


def test_damage_while_the_parts_are_joined_is_an_error_and_mended_by_the_next_command(tmp_path):
    store = begun_again(tmp_path)
    files = whole(store, 4)
    name = '000000008-000000016.npy'
    (tmp_path / 'set.npz.parts' / name).write_bytes(files[name][:-40] + bytes(24) + files[name][-16:])
    with pytest.raises(UserError, match=f'{name} is damaged'):
        store.finish()
    assert not (tmp_path / 'set.npz').exists()
    again = begun_again(tmp_path)
    assert whole(again, 4) == files
    again.finish()
    assert again.begin() is None


def test_parts_of_earlier_versions_have_no_checksum_and_are_taken(tmp_path):
    for name, data in whole(begun_again(tmp_path), 4).items():
        (tmp_path / 'set.npz.parts' / name).write_bytes(data[:-16])
        np.testing.assert_array_equal(np.load(tmp_path / 'set.npz.parts' / name).shape[1:], (4, 4, 3))
    again = begun_again(tmp_path)
    assert again.begin() == 0 and again.missing() == []
    again.finish()
    assert open_set(tmp_path / 'set.npz').count == 20


@pytest.mark.parametrize('content', [
    lambda data: data[:1000], lambda data: bytes([*data[:300], data[300] ^ 4, *data[301:]]),
    lambda data: archive(arr_0=np.zeros((19, 4, 4, 3), np.uint8), arr_1=np.arange(20)),
    lambda data: archive(arr_0=np.zeros((20, 4, 4, 3), np.int8), arr_1=np.arange(20)),
    lambda data: archive(arr_0=np.zeros((20, 4, 4, 3), np.uint8), arr_1=np.zeros(20, np.int64)),
    lambda data: archive(arr_0=np.zeros((20, 4, 4, 3), np.uint8)), lambda data: archive()])
def test_a_finished_set_is_whole_only_with_all_that_it_should_have(tmp_path, content):
    store = begun_again(tmp_path)
    whole(store, 4)
    store.finish()
    (tmp_path / 'set.npz').write_bytes(content((tmp_path / 'set.npz').read_bytes()))
    with pytest.raises(UserError, match=r'(?s)set.npz is damaged: .*Delete it and run the same command'):
        begun_again(tmp_path).begin()


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


LINES = [{'file': f'{i:05d}_seed0.png', 'prompt': 'a cat'} for i in range(4)]


def folder_store(tmp_path, lines=LINES):
    return FolderStore(tmp_path / 'out', {**CARD, 'pictures': {'prompts': ['a cat']}},
                       [line['file'] for line in lines], 2, lines)


@pytest.mark.parametrize('at', [0, 20, 60, -30, -2, slice(0, 0), slice(0, 50), slice(0, -12)])
def test_a_damaged_png_file_is_drawn_again(tmp_path, at):
    store = folder_store(tmp_path)
    assert store.begin() == 4
    for part in store.parts:
        store.write(part, pixels(part, 2, 8))
    assert folder_store(tmp_path).begin() is None
    path = tmp_path / 'out' / LINES[2]['file']
    data = bytearray(path.read_bytes())
    if isinstance(at, slice):
        path.write_bytes(data[at])
    else:
        data[at] ^= 16
        path.write_bytes(data)
    again = folder_store(tmp_path)
    assert again.begin() == 1 and again.missing() == [1]
    again.write(1, pixels(1, 2, 8))
    assert again.missing() == [] and folder_store(tmp_path).begin() is None


def test_another_image_in_the_place_of_one_is_told_and_so_is_a_link_to_nothing(tmp_path):
    store = folder_store(tmp_path)
    store.begin()
    for part in store.parts:
        store.write(part, pixels(part, 2, 8))
    first, last = (tmp_path / 'out' / LINES[i]['file'] for i in (0, 3))
    right = first.read_bytes()
    for damage in (lambda: first.write_bytes(last.read_bytes()), lambda: first.symlink_to('nowhere')):
        first.unlink()
        damage()
        again = folder_store(tmp_path)
        assert again.begin() == 1 and again.missing() == [0]
        again.write(0, pixels(0, 2, 8))
        assert first.read_bytes() == right and not first.is_symlink()
    save_png(first, pixels(0, 2, 8)[0])        # an earlier version did not write what it is
    assert folder_store(tmp_path).begin() is None


def test_a_damaged_list_of_prompts_is_named_before_anything_is_written(tmp_path):
    folder_store(tmp_path).begin()
    path, before = tmp_path / 'out' / 'prompts.jsonl', os.listdir(tmp_path / 'out')
    for line in ('{"file": 3}', '[1]', '{"file"', '{"fil": "a"}', '"\\ud800"'):
        path.write_text(path.read_text().split('\n')[0] + '\n' + line + '\n')
        with pytest.raises(UserError, match='line 2 of .*prompts.jsonl is'):
            folder_store(tmp_path).begin()
    assert sorted(os.listdir(tmp_path / 'out')) == sorted(before)


def test_a_set_of_prompts_with_a_missing_image_is_not_scored(tmp_path):
    store = folder_store(tmp_path)
    store.begin()
    for part in store.parts:
        store.write(part, pixels(part, 2, 8))
    assert open_set(tmp_path / 'out').count == 4
    (tmp_path / 'out' / LINES[1]['file']).unlink()
    with pytest.raises(UserError, match='lacks 1 images that its prompts.jsonl lists .00001_seed0.png'):
        open_set(tmp_path / 'out')
