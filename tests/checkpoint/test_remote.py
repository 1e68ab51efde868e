"""Workdirs, model folders and checkpoints in a bucket, as far as TensorStore is not needed (see
test_gcs.py)."""
import io
import json
import logging
import shutil

import numpy as np
import pytest
from buckets import Store, bucket  # noqa: F401

from lit_jax.checkpoint import load, manager, model_folder
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.workdir import check_workdir, claim_workdir, is_workdir, read_workdir
from lit_jax.runtime import storage
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, files_under

MODEL = {'model': {'family': 'dit'}, 'diffusion': {'steps': 1000, 'kind': 'linear'},
         'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}, 'classes': None, 'provenance': {}}
PARAMS = {'w': np.arange(6, dtype=np.float32)}


@pytest.fixture
def run(bucket, monkeypatch):  # noqa: F811
    """A place in the bucket. Free space is not asked for there: asking is an error."""
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: pytest.fail('asked for free space'))
    return as_path(bucket) / 'runs' / 'a'


@pytest.fixture
def arrays(monkeypatch):
    """Stands in for Orbax and TensorStore: the first leaf in one object."""
    def write(path, tree, by_layer):
        (path / 'w').write_bytes(tree['w'].tobytes())
        (path / 'w.meta').write_bytes(b'x')

    def read(path, abstract=None):
        return {'w': np.frombuffer((path / 'w').read_bytes(), np.float32)}

    monkeypatch.setattr(model_folder, 'write_arrays', write)
    monkeypatch.setattr(model_folder, 'load_arrays', read)


def test_a_workdir_is_checked_claimed_and_read(run):
    check_workdir(run, {'seed': 1})
    assert not is_workdir(run)
    claim_workdir(run, {'seed': 1, 'sizes': (1, 2)}, {'classes': None})
    assert is_workdir(run) and read_workdir(str(run))['recipe'] == {'seed': 1, 'sizes': [1, 2]}
    check_workdir(run, {'seed': 1, 'sizes': (1, 2)})
    with pytest.raises(UserError, match='gs://bucket/runs/a belongs to another recipe:\n  seed: 1 there, 2 '
                                        'in this'):
        check_workdir(run, {'seed': 2, 'sizes': (1, 2)})
    (run / 'config.json').write_text('{')
    with pytest.raises(UserError, match='gs://bucket/runs/a/config.json is damaged, it is not JSON'):
        read_workdir(run)
    (run / 'config.json').unlink()
    (run / 'checkpoints' / 'x').write_text('x')
    with pytest.raises(UserError, match='has checkpoints but no config.json'):
        check_workdir(run, {'seed': 1})


def test_a_bucket_that_is_wrong_or_closed_is_a_clear_error(run):
    with pytest.raises(UserError, match='gs://bukket/run: there is no such bucket'):
        check_workdir('gs://bukket/run', {})
    with pytest.raises(UserError, match='gs://bucket/runs/a does not exist; expected a model folder'):
        load.load_weights(run)
    Store.broken = OSError('Forbidden')
    for act in (lambda: check_workdir(run, {}), lambda: claim_workdir(run, {}, {}),
                lambda: load.load_weights(run)):
        with pytest.raises(UserError, match='gs://bucket/runs/a.* cannot be reached: Forbidden'):
            act()


def test_a_manifest_holds_sizes_and_finds_what_they_show(run):
    (run / 'a' / 'b').write_text('12345')
    (run / 'c').write_text('1')
    storage.write_manifest(run, skip=('c',))
    assert storage.read_manifest(run) == {'a/b': {'bytes': 5}}
    storage.add_to_manifest(run, ('c', 'absent'))
    assert storage.read_manifest(run) == {'a/b': {'bytes': 5},
                                          'c': {'bytes': 1}} and storage.find_damage(run) == []
    (run / 'a' / 'b').write_text('1234')
    (run / 'c').unlink()
    assert storage.find_damage(run) == ['gs://bucket/runs/a/a/b: 4 bytes where 5 were written',
                                        'gs://bucket/runs/a/c: missing']
    (run / 'manifest.json').write_text((run / 'manifest.json').read_text().replace('5', '4'))
    assert 'manifest.json: damaged' in storage.find_damage(run)[0]


def test_a_model_folder_is_written_with_its_config_last(run, arrays):
    assert model_folder.save_model_folder(run, MODEL, PARAMS) == run
    assert [name.rsplit('/')[-1] for name in Store.objects] == ['w', 'w.meta', 'manifest.json', 'config.json']
    config, params = model_folder.load_model_folder(str(run))
    assert config == {'format': 1, **MODEL}
    np.testing.assert_array_equal(params['w'], PARAMS['w'])
    with pytest.raises(UserError, match='exists and is not empty'):
        model_folder.save_model_folder(run, MODEL, PARAMS)
    model_folder.save_model_folder(run, MODEL, {'w': PARAMS['w'][:2]}, overwrite=True)
    assert len(model_folder.load_model_folder(run)[1]['w']) == 2
    (run / 'arrays' / 'w').write_bytes(b'123')
    with pytest.raises(UserError, match='arrays/w: 3 bytes where 8 were written'):
        model_folder.load_model_folder(run)


def test_a_model_folder_that_could_not_be_finished_is_none(run, arrays, monkeypatch):
    model_folder.save_model_folder(run, MODEL, PARAMS)

    def breaks(path, tree, by_layer):
        assert not model_folder.is_model_folder(run)  # a reader must not meet the old config with new arrays
        (path / 'w').write_bytes(b'part')
        raise ValueError('the network went away')

    monkeypatch.setattr(model_folder, 'write_arrays', breaks)
    with pytest.raises(ValueError, match='the network went away'):
        model_folder.save_model_folder(run, MODEL, PARAMS, overwrite=True)
    assert files_under(run) == {}
    with pytest.raises(UserError, match='there is no such folder'):
        model_folder.load_model_folder(run)


def make_checkpoint(root, step, committed=True):
    path = root / 'checkpoints' / f'{step:09d}'
    (path / 'state' / 'd' / '0').write_text(f'arrays of {step}')
    (path / 'meta' / 'metadata').write_text(json.dumps({'seen': step}))
    storage.write_manifest(path)
    if committed:
        (path / 'commit_success.txt').write_text('yes')
    return path


def test_checkpoints_count_from_their_commit_on_and_damaged_ones_are_left_out(run, monkeypatch, caplog):
    monkeypatch.setattr(manager, 'restore_tree', lambda path, *_: (path / 'd' / '0').read_text())
    monkeypatch.setattr(manager, 'read_leaf', lambda path, name: None)
    assert Checkpoints(run).steps() == [] and Checkpoints(run).restore_latest({}) is None
    for step in (1, 2):
        make_checkpoint(run, step)
    young = make_checkpoint(run, 3, committed=False)
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [1, 2]
    (run / 'checkpoints' / '000000002' / 'state' / 'd' / '0').write_text('short')
    assert checkpoints.restore_part('ema') == ('arrays of 1', 1)
    assert young.is_dir() and checkpoints.steps() == [1, 2]  # a reader changes nothing
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore_latest({}) == ('arrays of 1', {'seen': 1}, 1)
    assert 'gs://bucket/runs/a/checkpoints/000000002/state/d/0: 5 bytes where 11 were written' in caplog.text
    assert 'resuming from step 1' in caplog.text
    assert checkpoints.steps() == [1] and not young.exists()
    damaged = run / 'checkpoints' / '000000002'
    assert '5 bytes where 11' in (damaged
                                  / 'damaged.txt').read_text() and not (
                                      damaged / 'commit_success.txt').exists()
    assert Checkpoints(run).restore_latest({}) == ('arrays of 1', {'seen': 1}, 1)  # once is enough
    assert damaged.is_dir()
    assert set(storage.read_manifest(run / 'checkpoints' / '000000001')) == {'state/d/0', 'meta/metadata',
                                                                             'commit_success.txt'}
    (run / 'checkpoints' / '000000001' / 'manifest.json').unlink()
    with pytest.raises(UserError,
                       match='none of the 1 checkpoints in gs://bucket/runs/a/checkpoints is whole'):
        checkpoints.restore_latest({})


def test_images_and_the_report_go_to_the_bucket(run):
    from PIL import Image

    from lit_jax.report.grids import save_png
    from lit_jax.report.html import write_run_report
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    save_png(run / 'samples' / '000000007.png', image)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO((run / 'samples' / '000000007.png').read_bytes()))), image)
    write_run_report(run, [], {'recipe': {'name': 'tiny'}})
    assert 'EMA weights at step 7' in (run / 'report.html').read_text()
