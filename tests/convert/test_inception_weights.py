"""Weights of FID-Inception: found, checked, the same from every form, and each mistake named."""
import hashlib
import pickle
import socket

import numpy as np
import pytest
from inception_samples import flax_tree, named_by_digest, torch_state

from lit_jax.convert import inception_download, inception_weights
from lit_jax.convert.inception_weights import (
    Inception,
    find_inception,
    load_inception,
    read_inception_params,
    save_inception,
)
from lit_jax.models.inception import InceptionNetwork
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No weights of this machine, and no network."""
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('LIT_JAX_INCEPTION', raising=False)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(inception_download, 'URL', f'http://127.0.0.1:{port}/weights.pth')


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    """(our own file of the golden weights, their parameters)."""
    params = read_inception_params(torch_state(), 'golden', InceptionNetwork())
    file = tmp_path_factory.mktemp('ours') / 'inception.safetensors'
    save_inception(file, Inception(InceptionNetwork(), params, 'ab' * 32, 'golden.pth'))
    return file, params


def same(a, b) -> bool:
    a, b = named_leaves(a), named_leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------
# Forms


@pytest.mark.peers
@pytest.mark.slow
def test_every_form_gives_the_same_parameters(convert, tmp_path, capsys, ours):
    import torch
    state = {key: torch.from_numpy(value) for key, value in torch_state().items()}
    state['Mixed_5b.branch1x1.bn.num_batches_tracked'] = torch.tensor(0)
    for name, zipped in (('pt_inception_old', False), ('pt_inception_new', True)):
        torch.save(state, tmp_path / f'{name}.pth', _use_new_zipfile_serialization=zipped)
        inception = load_inception(named_by_digest(tmp_path / f'{name}.pth'))
        assert same(inception.params, ours[1]) and not inception.published
        assert inception.source.startswith(name) and len(inception.sha256) == 64
    file = next(tmp_path.glob('pt_inception_old-*.pth'))
    assert convert(file, '--out', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert 'NOT the published weights' in printed \
        and f'LIT_JAX_INCEPTION={tmp_path / "out" / "inception.safetensors"}' in printed
    again = load_inception(tmp_path / 'out')
    assert same(again.params, ours[1]) and again.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert again.source == file.name
    with pytest.raises(UserError, match='exists already'):
        convert(file, '--out', tmp_path / 'out')


@pytest.mark.slow
def test_the_flax_pickle(tmp_path, ours):
    file = tmp_path / 'inception_v3_weights_fid.pickle'
    file.write_bytes(pickle.dumps(flax_tree(torch_state())))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f'{file.name} has the sha256 {digest}, but the published files have'):
        load_inception(file)
    assert same(load_inception(file, sha256=digest).params, ours[1])


def test_our_own_file(ours):
    inception = load_inception(ours[0], 'bfloat16')
    assert same(inception.params, ours[1])
    assert inception.describe() == {'network': 'FID-Inception of 2015-12-05', 'weights': 'golden.pth',
                                    'sha256': 'ab' * 32, 'published': False, 'precision': 'bfloat16',
                                    'resize': 'TensorFlow 1 bilinear to 299 x 299'}


def test_what_counts_as_published(ours):
    for digest in ('6726825d' + '0' * 56, '4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77'):
        assert Inception(InceptionNetwork(), {}, digest, 'x').published


# ------------------------------------------------------------------------------------------------------
# Places


def test_the_order_of_places(tmp_path, monkeypatch, ours):
    (tmp_path / 'torch' / 'hub' / 'checkpoints').mkdir(parents=True)
    hub = tmp_path / 'torch' / 'hub' / 'checkpoints' / inception_download.PUBLISHED_NAME
    hub.write_bytes(b'x')
    assert find_inception() == hub
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'inception.safetensors').write_bytes(b'x')
    assert find_inception() == tmp_path / 'cache' / 'inception.safetensors'
    monkeypatch.setenv('LIT_JAX_INCEPTION', str(ours[0].parent))
    assert find_inception() == ours[0]
    assert find_inception(tmp_path / 'cache') == tmp_path / 'cache' / 'inception.safetensors'
    monkeypatch.setenv('LIT_JAX_INCEPTION', str(tmp_path / 'no'))
    with pytest.raises(UserError, match=r'no \(from LIT_JAX_INCEPTION\) does not exist'):
        find_inception()
    with pytest.raises(UserError, match='holds no weights of Inception'):
        find_inception(tmp_path)


def test_without_a_network(tmp_path):
    with pytest.raises(UserError,
                       match=f'cannot be fetched from .*put it at {tmp_path}/cache/.*LIT_JAX_INCEPTION'):
        load_inception()
    assert list((tmp_path / 'cache').iterdir()) == []


def test_the_download(tmp_path, monkeypatch):
    published = tmp_path / 'published'
    published.write_bytes(b'weights' * 1000)
    monkeypatch.setattr(inception_download, 'URL', published.as_uri())
    with pytest.raises(UserError, match='expected one that begins with 6726825d'):
        find_inception()
    assert list((tmp_path / 'cache').iterdir()) == []
    monkeypatch.setattr(inception_download, 'DIGEST', hashlib.sha256(published.read_bytes()).hexdigest()[:8])
    file = find_inception()
    assert [*(tmp_path / 'cache').iterdir()] == [file] and file.name == inception_download.PUBLISHED_NAME
    assert file.read_bytes() == published.read_bytes()
    published.unlink()
    assert find_inception() == file


# ------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    file = tmp_path / inception_download.PUBLISHED_NAME
    file.write_bytes(b'half a file')
    with pytest.raises(UserError, match='its name says 6726825d.*damaged, incomplete, or another file'):
        load_inception(tmp_path)
    with pytest.raises(UserError, match='was asked for 00000000'):
        load_inception(file, sha256='00000000')
    with pytest.raises(UserError, match='8 to 64 hexadecimal digits'):
        load_inception(file, sha256='6726')
    with pytest.raises(UserError, match='truncated or damaged'):
        load_inception(file, sha256=hashlib.sha256(b'half a file').hexdigest())


def test_everything_wrong_is_told_at_once():
    state = torch_state()
    del state['Mixed_6a.branch3x3.conv.weight']
    state['fc.weight'] = state['fc.weight'][:1000]
    state['Mixed_5b.branch1x1.bn.bias'] = np.full(64, np.nan, np.float32)
    state['Conv2d_1a_3x3.bn.weight'] = np.ones(32, np.int64)
    state['AuxLogits.fc.weight'] = state['Mixed_7d.bn.bias'] = np.ones(1, np.float32)
    with pytest.raises(UserError) as caught:
        read_inception_params(state, 'it', InceptionNetwork())
    for words in ('missing: Mixed_6a.branch3x3.conv.weight [384, 288, 3, 3]',
                  'fc.weight has [1000, 2048], expected [1008, 2048]',
                  'not finite floats: Mixed_5b.branch1x1.bn.bias',
                  'not finite floats: Conv2d_1a_3x3.bn.weight (int64)',
                  'unexpected: Mixed_7d.bn.bias'):
        assert words in str(caught.value)
    assert 'AuxLogits' not in str(caught.value)


def test_flags_of_diffusion_models(convert, tmp_path):
    (tmp_path / 'inception.pth').write_bytes(b'x')
    with pytest.raises(UserError, match='by its name; --arch, --heads is for diffusion models'):
        convert(tmp_path / 'inception.pth', '--arch', 'dit_xl', '--heads', 2, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('damage', ['shorter', 'a bit', 'another file', 'header'])
def test_damage_of_our_own_file(tmp_path, ours, damage):
    data = bytearray(ours[0].read_bytes())
    if damage == 'shorter':
        data = data[:-100]
    elif damage == 'a bit':
        data[len(data) // 2] ^= 1
    elif damage == 'header':
        data[:8] = (2 ** 40).to_bytes(8, 'little')
    else:
        from safetensors.numpy import save
        data = save({'x': np.ones(3, np.float32)})
    (tmp_path / 'x.safetensors').write_bytes(data)
    with pytest.raises(UserError, match='damaged|that this lit_jax wrote'):
        load_inception(tmp_path / 'x.safetensors')
    assert inception_weights.FILE == ours[0].name
