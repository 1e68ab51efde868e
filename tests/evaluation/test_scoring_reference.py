"""References in ADM's layout: made from images, stopped and continued, read again, and refused where they do
not fit."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import on_cpu
from scoring_samples import digits_uint8

from lit_jax.data.toys.digits import open_digits
from lit_jax.evaluation import build_reference as build
from lit_jax.evaluation.build_reference import build_reference
from lit_jax.evaluation.evaluate_options import ReferenceOptions
from lit_jax.evaluation.reference import open_reference
from lit_jax.evaluation.spaces import digits_space, open_space
from lit_jax.metrics.toys.digits_judge import FEATURES, load_judge
from lit_jax.runtime.errors import UserError


@pytest.fixture
def request_of(judge, tmp_path_factory, tmp_path):
    return ReferenceOptions(data='digits', out=str(tmp_path / 'ref.npz'),
                   data_dir=str(tmp_path_factory.getbasetemp() / 'datasets'),
                   features=f'digits:{judge}', images=100)


def arrays_of(path):
    with np.load(path) as arrays:
        return dict(arrays)


def all_digits(request):
    source = open_digits('train', Path(request.data_dir))
    images = np.clip(127.5 * source.images + 128, 0, 255).astype(np.uint8)
    return np.repeat(images, 3, axis=-1), source.labels


def test_statistics_are_of_all_images_and_some_of_them_are_kept(request_of, judge):
    line = build_reference(request_of)
    arrays, (images, _) = arrays_of(request_of.out), all_digits(request_of)
    assert sorted(arrays) == ['arr_0', 'meta', 'mu', 'sigma'] and '1437 images, 100 of them' in line
    pool = open_space(f'digits:{judge}').extract(images).pool.astype(np.float64)
    np.testing.assert_allclose(arrays['mu'], pool.mean(0), rtol=1e-10)
    np.testing.assert_allclose(arrays['sigma'], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-12)
    chosen = np.sort(np.random.default_rng(0).choice(1437, 100, replace=False))
    np.testing.assert_array_equal(arrays['arr_0'], images[chosen])
    meta = json.loads(str(arrays['meta']))
    assert meta['features']['flavour'] == 'digits judge' and meta['count'] == 1437 and meta['left_out'] == 0
    assert meta['data'] == {'name': 'digits', 'count': 1437, 'classes': 10,
                            'split': 'train'} and meta['image_size'] == 8
    assert os.listdir(Path(request_of.out).parent) == ['ref.npz']


def test_stopped_and_continued_it_has_the_same_bytes(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(build, '_MIN_PART', 500)
    straight = replace(request_of, out=str(tmp_path / 'straight.npz'))
    build_reference(straight)
    make, made = build._Builder.make, []

    def stopping(self, part):
        if made:
            raise KeyboardInterrupt
        made.append(part)
        make(self, part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build._Builder, 'make', stopping)
        build_reference(request_of)
    assert sorted(os.listdir(tmp_path / 'ref.npz.parts')) == ['00000.npz',
                                                              'plan.json'] and not Path(
                                                                  request_of.out).exists()
    seeds = 'images.seed: 0 there, 1 now'
    with pytest.raises(UserError, match=f'ref.npz.parts belongs to another reference:\n  {seeds}'):
        build_reference(replace(request_of, seed=1))
    build_reference(request_of)
    assert Path(request_of.out).read_bytes() == Path(straight.out).read_bytes() and made == [0]
    assert 'there already' in build_reference(request_of)
    with pytest.raises(UserError, match=r'is another reference(.|\n)*images.count: 100 there, 50 now'):
        build_reference(replace(request_of, images=50))


@pytest.mark.parametrize('as_file', [False, True])
def test_a_subset_of_the_classes(request_of, tmp_path, as_file):
    classes = '7,3'
    if as_file:
        classes = str(tmp_path / 'classes.txt')
        Path(classes).write_text('7\n3\n')
    build_reference(replace(request_of, classes=classes, images=10000))
    arrays, (images, labels) = arrays_of(request_of.out), all_digits(request_of)
    np.testing.assert_array_equal(arrays['arr_0'], images[np.isin(labels, [3, 7])])
    meta = json.loads(str(arrays['meta']))
    assert meta['classes'] == ['3', '7'] and meta['count'] == np.isin(labels, [3, 7]).sum()
    with pytest.raises(UserError, match="unknown class 'cat'; this data set knows 0..9: 0, 1, 2"):
        build_reference(replace(request_of, classes='3,cat', out=str(tmp_path / 'other.npz')))


def test_a_folder_is_cropped_and_what_is_damaged_left_out(request_of, tmp_path, judge, caplog):
    images, labels = digits_uint8(30)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / 'pictures' / f'class {label}' / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(image, ((0, 0), (2, 2), (0, 0)))).save(path)
    broken = sorted((tmp_path / 'pictures').rglob('*.png'))[4]
    broken.write_bytes(broken.read_bytes()[:50])
    wanted = replace(request_of, data='folder', path=str(tmp_path / 'pictures'), image_size=8, images=1000)
    assert '1 that cannot be decoded are left out' in build_reference(wanted)
    arrays = arrays_of(request_of.out)
    order = np.argsort(labels, kind='stable')
    np.testing.assert_array_equal(arrays['arr_0'], np.delete(images[order], 4, axis=0))
    assert json.loads(str(arrays['meta']))['crop'] == 'adm-center-crop' and broken.name in caplog.text
    assert 'there already' in build_reference(wanted)
    Image.fromarray(np.full((8, 12, 3), 7, np.uint8)).save(sorted((tmp_path / 'pictures').rglob('*.png'))[0])
    with pytest.raises(UserError, match=r'is another reference:\n  data.some_bytes: '):
        build_reference(wanted)
    with pytest.raises(UserError, match='cannot be decoded'):
        build_reference(replace(wanted, strict=True, out=str(tmp_path / 'strict.npz')))


def test_it_is_read_as_what_it_is(request_of, judge):
    build_reference(request_of)
    reference = open_reference(request_of.out, open_space(f'digits:{judge}'))
    arrays = arrays_of(request_of.out)
    np.testing.assert_array_equal(reference.statistics['pool'].mean, arrays['mu'])
    assert reference.statistics['pool'].count == 1437 and reference.images.count == 100 \
        and reference.image_shape == (8, 8)
    facts = reference.facts()
    assert facts['id'] == 'ref.npz' and facts['statistics'] == 'stored in it, of 1437 images' and len(
        facts['sha256']) == 64


def test_the_script_makes_the_same_file(request_of, tmp_path):
    """On one device; here there are eight."""
    build_reference(request_of)
    done = subprocess.run([sys.executable, 'evaluate.py', 'reference', '--data=digits',
                           f'--data_dir={request_of.data_dir}',
                           f'--features={request_of.features}', '--images=100',
                           f'--out={tmp_path / "script.npz"}'],
                          cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200,
                          env=on_cpu())
    assert done.returncode == 0 and done.stdout.startswith('wrote'), done.stderr
    assert (tmp_path / 'script.npz').read_bytes() == Path(request_of.out).read_bytes()


def test_a_reference_of_other_features_is_refused(request_of, judge):
    build_reference(request_of)
    other = load_judge(judge)
    other.params['head'] = other.params['head'] + 1
    with pytest.raises(UserError, match=r"was made with other features:\n  sha256: '.*' there, '.*' now"):
        open_reference(request_of.out, digits_space(other))


@pytest.mark.parametrize('arrays, message', [
    ({'labels': np.arange(3)}, 'expected mu and sigma, or images in arr_0; it contains labels'),
    ({'mu': np.zeros(FEATURES), 'sigma': np.eye(9)}, r'mu has shape \[48\] and sigma \[9, 9\]'),
    ({'mu': np.zeros(2048), 'sigma': np.eye(2048)},
     'mu has 2048 numbers, but the features of this evaluation .digits judge. have 48'),
    ({'mu': np.full(FEATURES, np.nan), 'sigma': np.eye(FEATURES)}, 'contains NaN'),
    ({'mu': np.zeros(FEATURES, np.int64), 'sigma': np.eye(FEATURES)}, 'mu is int64'),
    ({'mu': np.array([{}] * FEATURES, dtype=object), 'sigma': np.eye(FEATURES)}, 'pickled objects'),
    ({'mu': np.zeros(FEATURES), 'sigma': np.eye(FEATURES), 'meta': np.asarray('{}')}, 'meta was not written'),
    ({'arr_0': np.zeros((4, 8, 8, 3), np.float32)}, 'arr_0: float32')])
def test_files_that_are_no_reference(tmp_path, judge, arrays, message):
    np.savez(tmp_path / 'ref.npz', **arrays)
    with pytest.raises(UserError, match=message):
        open_reference(tmp_path / 'ref.npz', open_space(f'digits:{judge}'))


@pytest.mark.parametrize('change, message', [
    ({'data': 'latents'}, 'needs images'), ({'images': 0}, '--images must be at least 1'),
    ({'out': 'ref'}, 'ends with .npz'), ({'data': 'folder', 'path': ''}, 'folder'),
    ({'image_size': 9}, 'image_size 8')])
def test_a_wrong_request_is_refused(request_of, change, message):
    with pytest.raises(UserError, match=message):
        build_reference(replace(request_of, **change))
