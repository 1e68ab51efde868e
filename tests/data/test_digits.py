"""The real digits: exact pixels, fixed splits, a cache that is whole or absent, and no TensorFlow."""
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lit_jax.data.sources import default_data_dir, open_source
from lit_jax.data.toys.digits import open_digits
from lit_jax.runtime.errors import UserError


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('datasets')
    open_digits('train', folder)
    return folder


def run_python(code: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with the path of this one."""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)


def test_splits_are_the_documented_permutation_of_the_original(data_dir):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    for split, numbers in {'held_out': np.sort(order[:360]), 'train': np.sort(order[360:])}.items():
        source = open_digits(split, data_dir)
        assert len(source) == len(numbers)
        # multiples of 1/8: exact
        expected = (images[numbers].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
        np.testing.assert_array_equal(source.images, expected)
        np.testing.assert_array_equal(source.labels, labels[numbers])


def test_elements_keep_the_contract(data_dir):
    source = open_digits('train', data_dir)
    element = source[3]
    assert element['image'].shape == (8, 8, 1) and element['image'].dtype == np.float32
    assert element['label'].dtype == np.int32
    assert source.images.min() == -1 and source.images.max() == 1
    assert sorted(set(source.labels.tolist())) == list(range(10)) and source.class_names == list('0123456789')
    batch = source.take([5, 3])
    np.testing.assert_array_equal(batch['image'][1], element['image'])
    assert batch['label'].dtype == np.int32 and batch['image'].flags['C_CONTIGUOUS']
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(ValueError, match='read-only'):
        element['image'][0] = 0  # nobody changes the data set by accident


def test_it_works_without_tensorflow(tmp_path):
    result = run_python(f'''
import sys
from lit_jax.data.sources import open_source
assert len(open_source('digits', split='held_out', data_dir={str(tmp_path)!r})) == 360
assert 'tensorflow' not in sys.modules
''')
    assert result.returncode == 0, result.stderr
    assert result.stdout == ''  # tfds would announce a download


def test_a_second_opening_reads_what_the_first_wrote(data_dir):
    folder = data_dir / 'digits' / '1.0.0'
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    open_digits('held_out', data_dir)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert any('array_record' in name for name in before)


def test_processes_that_start_together_all_get_the_data(tmp_path):
    code = f'''
from pathlib import Path
from lit_jax.data.toys.digits import open_digits
print(len(open_digits('train', Path({str(tmp_path)!r}))))
'''
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_python, [code] * 2))
    assert [(r.returncode, r.stdout) for r in results] == [(0, '1437\n')] * 2, [r.stderr for r in results]
    assert [path.name for path in (tmp_path / 'digits').iterdir()] == ['1.0.0']


def test_the_loser_of_a_race_takes_the_winners_data(tmp_path, data_dir, monkeypatch):
    """Another process renames its data set into place while this one is still writing."""
    from lit_jax.data.toys.digits_builder import Digits
    generate = Digits._generate_examples

    def other_finishes_first(self, numbers):
        if len(numbers) == 360:
            shutil.copytree(data_dir / 'digits' / '1.0.0', tmp_path / 'digits' / '1.0.0')
        yield from generate(self, numbers)

    monkeypatch.setattr(Digits, '_generate_examples', other_finishes_first)
    assert len(open_digits('train', tmp_path)) == 1437
    assert [path.name for path in (tmp_path / 'digits').iterdir()] == ['1.0.0']


def test_a_writer_killed_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path):
    result = run_python(f'''
import os, signal
from pathlib import Path
from lit_jax.data.toys.digits import open_digits
from lit_jax.data.toys.digits_builder import Digits
generate = Digits._generate_examples
def killed(self, numbers):
    for i, example in enumerate(generate(self, numbers)):
        if i == 300 and len(numbers) == 360:  # the other split is written
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
Digits._generate_examples = killed
open_digits('train', Path({str(tmp_path)!r}))
''')
    assert result.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / 'digits').iterdir()]
    assert left and '1.0.0' not in left
    assert len(open_digits('train', tmp_path)) == 1437
    assert len(open_digits('held_out', tmp_path)) == 360


def _truncate(folder):
    path = next(folder.glob('*train.array_record*'))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _flip_bytes(folder):
    path = next(folder.glob('*train.array_record*'))
    data = bytearray(path.read_bytes())
    data[len(data) // 4:len(data) // 4 + 16] = bytes(16)
    path.write_bytes(bytes(data))


def _remove_records(folder):
    next(folder.glob('*train.array_record*')).unlink()


def _remove_info(folder):
    (folder / 'dataset_info.json').unlink()


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize('damage', [_truncate, _flip_bytes, _remove_records, _remove_info, _empty])
def test_a_damaged_cache_says_what_to_delete(tmp_path, data_dir, damage):
    shutil.copytree(data_dir / 'digits', tmp_path / 'digits')
    folder = tmp_path / 'digits' / '1.0.0'
    damage(folder)
    with pytest.raises(UserError, match='damaged') as caught:
        open_digits('train', tmp_path)
    assert f'rm -r {folder}' in str(caught.value)
    shutil.rmtree(folder)
    assert len(open_digits('train', tmp_path)) == 1437  # the advice works


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(UserError, match='LIT_JAX_DATA') as caught:
        open_digits('train', tmp_path / 'file')
    assert str(tmp_path / 'file') in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from lit_jax.data.toys.digits_builder import Digits

    def full(self, numbers):
        raise OSError(28, 'No space left on device')
        yield

    monkeypatch.setattr(Digits, '_generate_examples', full)
    with pytest.raises(UserError, match='No space left on device'):
        open_digits('train', tmp_path)
    assert not list((tmp_path / 'digits').iterdir())


def test_unknown_split(data_dir):
    with pytest.raises(UserError, match="no split 'test'; known: train, held_out"):
        open_digits('test', data_dir)


def test_the_cache_folder_comes_from_the_environment(data_dir, monkeypatch, tmp_path):
    monkeypatch.setenv('LIT_JAX_DATA', str(data_dir))
    assert default_data_dir() == data_dir
    assert len(open_source('digits')) == 1437
    monkeypatch.delenv('LIT_JAX_DATA')
    monkeypatch.delenv('LIT_JAX_CACHE')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert default_data_dir() == tmp_path / '.cache/lit_jax/datasets'


@pytest.mark.parametrize('asked, own', [({'image_size': 32}, 'image_size 8'), ({'channels': 4}, 'channels 1'),
                                        ({'num_classes': 1000}, 'num_classes 10')])
def test_a_recipe_of_another_shape_is_refused(data_dir, asked, own):
    with pytest.raises(UserError, match=f'digits has {own}, the recipe asks for'):
        open_source('digits', data_dir=data_dir, **asked)
