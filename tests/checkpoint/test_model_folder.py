"""Model folders: what is written comes back bit for bit; bad input and accidents give one clear message."""

import json
import os
import resource
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.checkpoint import arrays, model_folder, null_caption
from lit_jax.checkpoint.model_folder import load_model_folder, read_config
from lit_jax.runtime import leaves, writers
from lit_jax.runtime.errors import UserError

CONFIG = {
    'model': {'family': 'dit', 'depth': 1, 'num_classes': 2},
    'diffusion': {'steps': 1000, 'kind': 'linear'},
    'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0},
    'classes': ['zero', 'one'],
    'provenance': {'source': 'a.pt', 'sha256': '00', 'weights': 'ema', 'tool': 'lit_jax 0'},
}


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'blocks': {'attn': {'kernel': rng.standard_normal((2, 3, 4), dtype=np.float32)},
                   'bias': jnp.asarray(rng.standard_normal(5), jnp.bfloat16)},
        'table': np.arange(6, dtype=np.int32).reshape(2, 3),
        'scale': np.float32(0.1),
        'nan': np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        'nothing': {},
    }


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def _assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def _files(root: Path) -> list[Path]:
    return sorted(path for path in Path(root).rglob('*') if path.is_file())


@pytest.fixture
def folder(tmp_path):
    return model_folder.save_model_folder(tmp_path / 'model', CONFIG, _params())


def test_round_trip_is_bitwise(folder):
    config, params = model_folder.load_model_folder(folder)
    assert config == {'format': 1, **CONFIG}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    _assert_same_bits(params, _params())
    assert model_folder.is_model_folder(folder)
    assert [path.name for path in folder.parent.iterdir()] == ['model']


def test_load_into_abstract_gives_placed_jax_arrays(folder):
    _, params = model_folder.load_model_folder(folder, _abstract(_params()))
    assert all(isinstance(leaf, jax.Array) and leaf.sharding.device_set == {jax.local_devices()[0]}
               for leaf in jax.tree.leaves(params))
    _assert_same_bits(params, _params())


def test_every_leaf_that_does_not_fit_is_listed_once(folder):
    abstract = _abstract(_params())
    abstract['table'] = jax.ShapeDtypeStruct((3, 2), np.int32)
    abstract['blocks']['bias'] = jax.ShapeDtypeStruct((5,), np.float32)  # Orbax alone would cast in silence
    abstract['new'] = jax.ShapeDtypeStruct((), np.float32)
    del abstract['scale']
    with pytest.raises(UserError) as error:
        model_folder.load_model_folder(folder, abstract)
    text = str(error.value)
    assert 'different: table is int32[2, 3], expected int32[3, 2]' in text
    assert 'different: blocks/bias is bfloat16[5], expected float32[5]' in text
    assert 'missing: new float32[]' in text and 'extra: scale float32[]' in text and '4 of its arrays' in text


@pytest.mark.parametrize('harm', ['flip', 'truncate', 'delete'])
def test_damage_to_any_file_is_found_and_named(folder, harm):
    for path in _files(folder):
        if path.name == 'config.json':
            continue  # people may edit it; its content is checked instead
        whole = path.read_bytes()
        if harm == 'delete':
            path.unlink()
        elif harm == 'truncate':
            path.write_bytes(whole[:-1])
        else:
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
        with pytest.raises(UserError, match='is damaged') as error:
            model_folder.load_model_folder(folder)
        assert str(path) in str(error.value)
        path.write_bytes(whole)
    model_folder.load_model_folder(folder)


def test_missing_arrays_directory(folder):
    for path in sorted(Path(folder, 'arrays').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / 'arrays').rmdir()
    assert not model_folder.is_model_folder(folder)
    with pytest.raises(UserError, match='arrays: missing'):
        model_folder.load_model_folder(folder)


def _without(key):
    return {k: v for k, v in CONFIG.items() if k != key}


@pytest.mark.parametrize('config, message', [
    ({**CONFIG, 'format': 3}, 'format 3; this version of lit_jax reads formats 1 and 2'),
    (_without('model'), '"model" is missing'),
    ({**CONFIG, 'latent': {'space': 'dreams', 'vae': None, 'scale': 1.0}}, 'latent.space'),
    ({**CONFIG, 'latent': {'space': 'vae', 'vae': 3, 'scale': '1'}}, 'latent.vae.*latent.scale'),
    ({**CONFIG, 'diffusion': {'steps': 0, 'kind': 'linear'}}, 'diffusion.steps'),
    ({**CONFIG, 'diffusion': {'steps': True, 'kind': 'linear'}}, 'diffusion.steps'),
    ({**CONFIG, 'classes': ['zero']}, '1 names for 2 classes'),
    ({**CONFIG, 'classes': 'zero'}, 'classes'),
    ({**CONFIG, 'provenance': {'loss': float('nan')}}, 'JSON'),
    ({**CONFIG, 'provenance': {'path': Path('a')}}, 'JSON'),
])
def test_bad_config_is_refused_on_save_and_on_load(tmp_path, folder, config, message):
    with pytest.raises(UserError, match=message):
        model_folder.save_model_folder(tmp_path / 'other', config, _params())
    assert not (tmp_path / 'other').exists()
    if 'JSON' not in message:
        (folder / 'config.json').write_text(json.dumps({'format': 1, **config}))
        with pytest.raises(UserError, match=message):
            model_folder.load_model_folder(folder)


@pytest.mark.parametrize('text', ['', '{"format": 1', '<!DOCTYPE html>', '[]', '\x00\x01'])
def test_config_that_is_no_config(folder, text):
    (folder / 'config.json').write_text(text)
    with pytest.raises(UserError, match=r'config\.json'):
        model_folder.load_model_folder(folder)


def test_paths_that_are_no_model_folder(tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'empty').mkdir()
    messages = {'absent': 'there is no such folder', 'file': 'it is a file', 'empty': 'it has no config.json'}
    for name, message in messages.items():
        assert not model_folder.is_model_folder(tmp_path / name)
        with pytest.raises(UserError, match=message):
            model_folder.load_model_folder(tmp_path / name)
    with pytest.raises(UserError, match='there is no such directory'):
        arrays.load_arrays(tmp_path / 'absent')


def test_targets_in_use_are_refused(tmp_path, folder):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.txt').write_text('years of work')
    with pytest.raises(UserError, match='a file of that name exists'):
        model_folder.save_model_folder(tmp_path / 'file', CONFIG, _params())
    with pytest.raises(UserError, match='exists and is not empty'):
        model_folder.save_model_folder(folder, CONFIG, _params(1))
    with pytest.raises(UserError, match='will not be overwritten'):
        model_folder.save_model_folder(tmp_path / 'home', CONFIG, _params(1), overwrite=True)
    assert (tmp_path / 'home' / 'thesis.txt').read_text() == 'years of work'
    _assert_same_bits(model_folder.load_model_folder(folder)[1], _params())


def test_overwrite_and_empty_target(tmp_path, folder):
    model_folder.save_model_folder(folder, CONFIG, _params(1), overwrite=True)
    _assert_same_bits(model_folder.load_model_folder(folder)[1], _params(1))
    (tmp_path / 'empty').mkdir()
    model_folder.save_model_folder(tmp_path / 'empty', CONFIG, _params(2))
    model_folder.save_model_folder(tmp_path / 'deep' / 'er', CONFIG, _params(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['deep', 'empty', 'model']


def test_failed_swap_puts_the_old_folder_back(folder, monkeypatch):
    rename = os.rename

    def fails_for_partial(source, target):
        if '.partial.' in Path(source).name:
            raise OSError('device went away')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', fails_for_partial)
    with pytest.raises(OSError, match='device went away'):
        model_folder.save_model_folder(folder, CONFIG, _params(1), overwrite=True)
    monkeypatch.undo()
    _assert_same_bits(model_folder.load_model_folder(folder)[1], _params())
    assert [path.name for path in folder.parent.iterdir()] == ['model']


def test_interrupted_swap_is_explained(folder):
    folder.rename(folder.with_name('.model.old.host.123'))
    with pytest.raises(UserError, match=r'previous folder is whole in .*\.model\.old\.host\.123'):
        model_folder.load_model_folder(folder)


def test_leftovers_of_dead_runs_are_removed_and_others_kept(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    target = tmp_path / 'model'
    mine = writers.sibling(target, 'partial')
    start, _, began = mine.name.rpartition('.')
    dead = mine.with_name(f'{start.rpartition(".")[0]}.{ended.pid}.{began}')
    other = writers._started(os.getppid())
    alive = mine.with_name(f'{start.rpartition(".")[0]}.{os.getppid()}.{other}')
    elsewhere = target.with_name(f'.model.partial.0123456789ab.{ended.pid}.{began}')
    for path in (mine, dead, alive, elsewhere):
        path.mkdir()
    model_folder.save_model_folder(target, CONFIG, _params())
    assert set(tmp_path.iterdir()) == {target, alive, elsewhere}


@pytest.fixture
def file_limit():
    """Files may not grow over 1 MB: a portable stand-in for a full disk; TensorStore fails in the same
    way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_fills_up_while_writing(folder, file_limit):
    big = {'kernel': np.ones((1000, 1000), np.float32)}
    with pytest.raises(UserError, match=r'no room to write .*model.*needs about [45]\.\d MB.*free'):
        model_folder.save_model_folder(folder, CONFIG, big, overwrite=True)
    with pytest.raises(UserError, match='no room'):
        arrays.save_arrays(folder.parent / 'arrays', big)
    assert [path.name for path in folder.parent.iterdir()] == ['model']
    _assert_same_bits(model_folder.load_model_folder(folder)[1], _params())


def test_disk_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r'needs about 1\.0 MB, and 1\.0 kB are free'):
        model_folder.save_model_folder(tmp_path / 'model', CONFIG, _params())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('by_layer, large, parts', [(True, 2 ** 27, 4), (True, 400, 9), (False, 400, 4)])
def test_rows_are_gone_when_the_next_are_read(tmp_path, monkeypatch, by_layer, large, parts):
    """The memory of a text encoder is bounded so: 2 GB is one of its arrays."""
    monkeypatch.setattr(arrays, 'LARGE_STACK', large)
    tree = {'a': {'b': np.arange(12.0), 'c': np.arange(60.0).reshape(6, 2, 5)}, 'd': np.ones((60, 1)),
            'e': np.float32(7)}
    arrays.save_arrays(tmp_path / 'arrays', tree, by_layer=by_layer)
    seen, before = [], None
    for rows in arrays.each_rows(tmp_path / 'arrays'):
        assert before is None or before() is None
        seen.append((rows.name, rows.start, rows.length, rows.values.tolist()))
        before = weakref.ref(rows.values)
        del rows
    assert len(seen) == parts
    assert list(dict.fromkeys(name for name, *_ in seen)) == ['a/c', 'd', 'a/b', 'e']      # the largest first
    for name, whole in leaves.named_leaves(tree).items():
        found = [(start, values) for other, start, length, values in seen
                 if other == name and length == len(np.atleast_1d(whole))]
        assert [start for start, _ in found] == sorted({start for start, _ in found})
        np.testing.assert_array_equal(np.concatenate([np.atleast_1d(values) for _, values in found]),
                                      np.atleast_1d(whole))
    jax.tree.map(np.testing.assert_array_equal, arrays.load_arrays(tmp_path / 'arrays'), tree)


def test_arrays_of_size_zero_are_refused(tmp_path):
    with pytest.raises(UserError, match='size zero cannot be saved: a/b'):
        arrays.save_arrays(tmp_path / 'arrays', {'a': {'b': np.zeros((0, 3))}})
    assert not list(tmp_path.iterdir())


def test_numpy_leaves_are_not_copied_to_save_them(tmp_path):
    """The converter's limit leaves no room for a second copy of a large model. Measured in a process of its
    own."""
    code = (
        'import resource, sys, numpy as np\n'
        'from lit_jax.checkpoint.arrays import save_arrays\n'
        'save_arrays(sys.argv[1] + "/warm", {"a": np.ones(1000, np.float32)})\n'
        'tree = {str(i): np.full(25_000_000, i, np.float32) for i in range(4)}\n'
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'save_arrays(sys.argv[1] + "/big", tree)\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n')
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, check=True,
                         timeout=120, cwd=root, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    grown_kib = int(out.stdout.split()[-1])
    assert grown_kib < 60_000  # the tree is 400 MB; Orbax's default would add all of it


def test_a_changed_config_is_refused_and_accepted_without_its_checksum(folder):
    """One digit of the scale of latents would draw other images without a word."""
    path = folder / 'config.json'
    text = path.read_text()
    assert 'checksum' not in read_config(folder)
    changed = text.replace('"scale": 1.0', '"scale": 1.5')
    assert changed != text
    path.write_text(changed)
    for read in (read_config, load_model_folder):
        with pytest.raises(UserError, match=r'config\.json is damaged: .*delete its field "checksum"'):
            read(folder)
    edited = json.loads(changed)
    del edited['checksum']                                  # as folders of earlier versions have none
    path.write_text(json.dumps(edited))
    assert read_config(folder)['latent']['scale'] == 1.5
    path.write_text(json.dumps(json.loads(text)))        # other spaces are no other content
    assert load_model_folder(folder)[0]['latent']['scale'] == 1.0


def test_every_damaged_letter_of_a_config_is_refused_or_means_the_same(folder):
    path = folder / 'config.json'
    text, want = path.read_text(), read_config(folder)
    for at, letter in enumerate(text):
        path.write_text(text[:at] + chr(ord(letter) ^ 1) + text[at + 1:])
        try:
            got = read_config(folder)
        except UserError as error:
            assert str(path) in str(error) or str(folder) in str(error)
        else:
            # Where the name of the checksum itself is hit.
            assert {name: got[name] for name in want} == want


@pytest.mark.parametrize('content', [b'', b'\x93NUMPY', b'PK\x03\x04', None])
def test_a_null_caption_that_is_none(tmp_path, content):
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = null_caption.pack(features)
    (tmp_path / null_caption.FILE).write_bytes(whole)
    assert np.array_equal(null_caption.read_file(tmp_path), features)
    huge = whole.replace(b'(2, 3)', b'(2, 300000000)')
    (tmp_path / null_caption.FILE).write_bytes(huge if content is None else content)
    with pytest.raises(UserError, match=r'null_caption\.npy is damaged'):
        null_caption.read_file(tmp_path)
    with pytest.raises(UserError, match='another sha256'):
        null_caption.checked(features + 1, null_caption.digest(features), tmp_path)
