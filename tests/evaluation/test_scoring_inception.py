"""The whole way with Inception: weights from a file, a reference from a folder, every score. Random
weights."""
import json

import jax
import numpy as np
import pytest
from PIL import Image

from lit_jax.convert.inception_weights import Inception, save_inception
from lit_jax.evaluation.build_reference import build_reference
from lit_jax.evaluation.evaluate_options import METRICS, ReferenceOptions, ScoreOptions
from lit_jax.evaluation.evaluation import evaluate
from lit_jax.evaluation.spaces import open_space
from lit_jax.models.inception import InceptionNetwork
from lit_jax.runtime.errors import UserError


@pytest.mark.slow
def test_a_set_against_itself_and_another(tmp_path, monkeypatch, caplog):
    devices = jax.devices()[:1]      # eight would fill up eight groups, at seconds each
    monkeypatch.setattr(jax, 'local_devices', lambda *_, **__: devices)
    network = InceptionNetwork()
    params = jax.tree.map(np.asarray, jax.jit(network.init)(jax.random.key(0)))
    weights = tmp_path / 'inception.safetensors'
    save_inception(weights, Inception(network, params, 'ab' * 32, 'random.pth'))
    (tmp_path / 'pictures').mkdir()
    for i in range(18):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(8,
                                      axis=0).repeat(9, axis=1)).save(tmp_path / 'pictures' / f'{i:02d}.png')
    line = build_reference(ReferenceOptions(data='folder', path=str(tmp_path / 'pictures'), image_size=32,
                                         out=str(tmp_path / 'ref.npz'), inception=str(weights)))
    assert 'statistics of 18 images, 18 of them' in line and 'not the published ones' in caplog.text
    with np.load(tmp_path / 'ref.npz') as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files}
        images = arrays['arr_0']
    assert shapes == {'mu': (2048,), 'sigma': (2048, 2048), 'mu_s': (2023,), 'sigma_s': (2023, 2023),
                      'arr_0': (18, 32, 32, 3), 'meta': ()}
    np.savez(tmp_path / 'same.npz', arr_0=images)
    np.savez(tmp_path / 'other.npz', arr_0=np.asarray(images)[::-1, ::-1] // 2)
    for name in ('same', 'other'):
        evaluate(ScoreOptions(reference=str(tmp_path / 'ref.npz'), samples=str(tmp_path / f'{name}.npz'),
                         inception=str(weights), out=str(tmp_path / 'scores'), metrics=METRICS))
    same, other = json.loads((tmp_path / 'scores' / 'scores.json').read_text())
    for name in ('fid', 'sfid'):
        assert same['scores'][name] < 1e-6 * other['scores'][name]
    assert same['scores']['precision'] == same['scores']['recall'] == 1
    assert same['scores']['kid'] < other['scores']['kid'] and same['scores']['skid'] < other['scores']['skid']
    assert same['impossible'] == {} and same['scores']['is'] >= 1
    assert any('fid: only 18 samples for features of 2,048 dimensions' in note for note in same['notes'])
    features = same['card']['features']
    assert features['sha256'] == 'ab' * 32 and features['precision'] == 'highest' and features[
        'weights'] == 'random.pth'


def test_without_weights_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv('LIT_JAX_INCEPTION', str(tmp_path / 'nowhere.pth'))
    np.savez(tmp_path / 'set.npz', arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r'nowhere.pth .from LIT_JAX_INCEPTION. does not exist'):
        evaluate(ScoreOptions(reference=str(tmp_path / 'set.npz'), samples=str(tmp_path / 'set.npz'),
                         out=str(tmp_path / 'scores')))
    assert not (tmp_path / 'scores').exists()


def test_weights_with_another_checksum_are_refused(tmp_path):
    (tmp_path / 'pt_inception-2015-12-05-6726825d.pth').write_bytes(b'not they')
    with pytest.raises(UserError, match='its name says 6726825d'):
        open_space(inception=str(tmp_path / 'pt_inception-2015-12-05-6726825d.pth'))
    with pytest.raises(UserError, match="unknown precision 'float16'"):
        open_space(precision='float16')
