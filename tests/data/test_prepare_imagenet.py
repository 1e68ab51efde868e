"""ImageNet from its archives, in small: tars of the same form become the data set of tfds, without
TensorFlow."""
import io
import os
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import encoded, noise

from lit_jax.data import prepare_imagenet as script
from lit_jax.data.crop import center_crop
from lit_jax.data.images import decode, to_float
from lit_jax.data.prepare_imagenet import ARCHIVES, COUNTS, prepare_imagenet, synsets
from lit_jax.data.sources import open_source
from lit_jax.runtime.errors import UserError

CLASSES = {'n01440764': 0, 'n01806143': 84, 'n15075141': 999}  # places in the list of synsets
SMALL = {'train': 6, 'validation': 3}


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def train_images() -> dict[str, bytes]:
    """Two a class; as in the real set one is CMYK, and one is a PNG that is called JPEG."""
    kinds = [('JPEG', 'RGB'), ('JPEG', 'CMYK'), ('PNG', 'RGB')]
    return {f'{synset}_{i}.JPEG': encoded(noise(40 + i, 30, mode, seed=i), kind)
            for (synset, (kind, mode)) in zip(CLASSES, kinds, strict=True) for i in range(2)}


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp('archives'), train_images()
    inner = {f'{synset}.tar': tar({name: data for name, data in images.items() if name.startswith(synset)})
             for synset in CLASSES}
    (folder / ARCHIVES['train']).write_bytes(tar(inner))
    names = [f'ILSVRC2012_val_{number:08}.JPEG' for number in (2, 1, 3)]  # not in the order of their numbers
    (folder / ARCHIVES['validation']).write_bytes(
        tar({name: encoded(noise(33, 44, seed=9), 'JPEG') for name in names}))
    return folder


@pytest.fixture(scope='module')
def data_dir(archives, tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    prepare_imagenet(archives, folder, SMALL)
    return folder


def test_the_archives_become_the_data_set_of_tfds(data_dir):
    assert [path.name for path in (data_dir / 'imagenet2012').iterdir()] == ['5.1.0']
    source = open_source('imagenet2012', data_dir=data_dir, image_size=16, num_classes=1000, channels=3)
    assert len(source) == 6 and source.class_names == synsets() and len(set(synsets())) == 1000
    images, seen = train_images(), set()
    for index in range(6):
        data, label, text = source.read(index)
        name = text.split('(')[1].rstrip(')')
        assert label == CLASSES[name.split('_')[0]] and data == images[name]  # the original bytes
        np.testing.assert_array_equal(source[index]['image'], to_float(center_crop(decode(data), 16)))
        seen.add(name)
    assert seen == set(images) and not source.bad


def test_validation_labels_belong_to_the_sorted_names(data_dir):
    source = open_source('imagenet2012', data_dir=data_dir, split='held_out', image_size=16)
    labels = {source.read(i)[2].split('_')[-1][:8]: synsets()[source.read(i)[1]] for i in range(3)}
    # The first three of the official list.
    assert labels == {'00000001': 'n01751748', '00000002': 'n09193705', '00000003': 'n02105855'}


def test_what_a_killed_run_left_is_removed(archives, tmp_path):
    left = tmp_path / 'imagenet2012' / '5.1.0.incomplete' / 'imagenet2012-train.array_record-00099'
    left.parent.mkdir(parents=True)
    left.write_bytes(b'x')
    folder = prepare_imagenet(archives, tmp_path, SMALL)
    assert [path.name for path in folder.parent.iterdir()] == ['5.1.0'] and not (folder / left.name).exists()


def test_a_second_run_does_nothing(data_dir, archives, capsys):
    before = sorted(path.stat().st_mtime_ns for path in data_dir.rglob('*'))
    prepare_imagenet(archives / 'gone', data_dir, SMALL)
    assert 'already exists' in capsys.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in data_dir.rglob('*')) == before


def test_archives_that_are_not_whole_are_noticed(archives, tmp_path):
    assert COUNTS == {'train': 1_281_167, 'validation': 50_000}
    with pytest.raises(UserError,
                       match=r"have {'train': 6, 'validation': 3} images, expected .* Download them again"):
        prepare_imagenet(archives, tmp_path)
    cut = shutil.copytree(archives, tmp_path / 'cut') / ARCHIVES['train']
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(UserError, match='an archive in .* is incomplete: unexpected end of data'):
        prepare_imagenet(tmp_path / 'cut', tmp_path, SMALL)
    with pytest.raises(UserError, match='imagenet2012 is not prepared'):
        open_source('imagenet2012', data_dir=tmp_path, image_size=16)


@pytest.mark.parametrize('left', [[], ['train'], ['validation']])
def test_missing_archives_are_named(archives, tmp_path, left):
    for split in left:
        shutil.copy(archives / ARCHIVES[split], tmp_path)
    missing = ' and '.join(name for split, name in ARCHIVES.items() if split not in left)
    with pytest.raises(UserError, match=f'lacks {missing}. Register at https://image-net.org'):
        prepare_imagenet(tmp_path, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_space_is_asked_for_before_the_start(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, 'disk_usage', lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match='has 0.0 GB free and needs 0.0. Free some'):
        prepare_imagenet(archives, tmp_path, SMALL)
    assert not list(tmp_path.glob('imagenet2012/*'))


def test_the_command_runs_without_tensorflow(archives, tmp_path):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, '-m', 'lit_jax.data.prepare_imagenet', f'--archives={archives}',
                           f'--data_dir={tmp_path}'], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # only because these archives are small
    assert 'error: the archives in' in done.stderr and 'TensorFlow' not in done.stderr
    assert done.stdout == '9 images written in 0 min\n'
