"""Pickled arrays, read as data: the same values as their writers give, nothing run, every damage seen."""
import pickle

import numpy as np
import pytest

from lit_jax.convert.array_pickles import flat_names, read_arrays
from lit_jax.runtime.errors import UserError


class Bomb:
    """Writes a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def state_dict():
    import torch
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    return {**model.state_dict(), 'turned': torch.arange(12.0).reshape(3, 4).T[1:],
            'half': torch.ones(3).half(),
            'brain': torch.full((2,), 1.5).bfloat16(), 'parameter': torch.nn.Parameter(torch.ones(2)),
            'shared': torch.arange(6.0)[2:4], 'double': torch.ones(2, dtype=torch.float64),
            'scalar': torch.tensor(3.0)}


@pytest.mark.peers
@pytest.mark.parametrize('zipped', [True, False])
def test_torch_files_old_and_new(tmp_path, zipped):
    import torch
    state = state_dict()
    torch.save(state, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    arrays = read_arrays(tmp_path / 'x.pth')
    assert list(arrays) == list(state)
    for name, value in state.items():
        assert np.array_equal(arrays[name].astype(np.float64), value.detach().double().numpy()), name
    whole = (tmp_path / 'x.pth').read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / 'part.pth').write_bytes(whole[:length])
        with pytest.raises(UserError, match='part.pth'):
            read_arrays(tmp_path / 'part.pth')


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_nested_dicts_of_arrays(tmp_path, protocol):
    rng = np.random.default_rng(0)
    tree = {'a': {'conv': {'kernel': rng.normal(size=(3, 3, 2, 4)).astype(np.float32)},
                  'columns first': np.asfortranarray(rng.normal(size=(3, 4)))},
            'fc': {'bias': np.arange(3.0).astype('>f8')}, 'note': 'no array'}
    (tmp_path / 'x.pickle').write_bytes(pickle.dumps(tree, protocol))
    got, want = flat_names(read_arrays(tmp_path / 'x.pickle')), flat_names(
        {name: tree[name] for name in ('a', 'fc')})
    assert list(got) == list(want)
    for name in want:
        assert np.array_equal(got[name], want[name])


@pytest.mark.parametrize('protocol', [2, 5])
def test_nothing_is_run(tmp_path, protocol):
    (tmp_path / 'x.pickle').write_bytes(pickle.dumps({'a': Bomb(tmp_path / 'went off')}, protocol))
    with pytest.raises(UserError, match=r'refused: it asks for (builtins|_?io)\.open.*Nothing of it was run'):
        read_arrays(tmp_path / 'x.pickle')
    assert not (tmp_path / 'went off').exists()


def test_names_are_never_looked_up(tmp_path):
    """Not by a dotted name below one that is known, and not by an import that would have effects."""
    for module, name in (('numpy', 'ndarray.__class__'), ('numpy.core.multiarray', 'fromfile'),
                         ('this', 's')):
        (tmp_path / 'x.pickle').write_bytes(b'\x80\x04' + b'\x8c' + bytes([len(module)]) + module.encode() +
                                            b'\x8c' +
                                            bytes([len(name)]) + name.encode() + b'\x93.')
        with pytest.raises(UserError, match='refused'):
            read_arrays(tmp_path / 'x.pickle')


@pytest.mark.parametrize('content, words', [
    (b'', 'truncated or damaged'), (b'<!DOCTYPE html><html>', 'truncated or damaged'),
    (pickle.dumps([1, 2]), 'holds a list'), (b'PK\x03\x04' + bytes(40), 'truncated or damaged'),
    (pickle.dumps({'a': np.array(['text'])}), 'floats or integers')])
def test_other_files(tmp_path, content, words):
    (tmp_path / 'x.pickle').write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_arrays(tmp_path / 'x.pickle')
    with pytest.raises(UserError, match='cannot be read'):
        read_arrays(tmp_path / 'nowhere')
