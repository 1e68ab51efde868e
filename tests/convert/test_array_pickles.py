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


def deep(levels: int) -> bytes:
    """Tuples in tuples."""
    return b'N' + b'\x85' * levels


def shared(levels: int, kind: bytes) -> bytes:
    """A dict or tuple of two references to one of the level below: 2^levels ways from the top."""
    content = b'}q\x00'
    for level in range(levels):
        if kind == b'}':
            content += b'}q' + bytes([level + 1]) + b'(' + b''.join(
                b'X\x01\x00\x00\x00' + name + b'h' + bytes([level]) for name in (b'a', b'b')) + b'u'
        else:
            content += b'h' + bytes([level]) + b'h' + bytes([level]) + b'\x86q' + bytes([level + 1])
    return content


@pytest.mark.parametrize('content, words', [
    (b'}' + deep(99_999) + b'Ns', 'a key of a dict is a tuple'), (b'}NNs', 'a key of a dict is a none'),
    (deep(99_999), 'holds a tuple'), (b'}X\x01\x00\x00\x00a' + deep(99_999) + b's', None),
    (b'Nr\xff\xff\xff\xff', 'holds a NoneType'), (b'j\xff\xff\xff\xff', 'entry 4294967295, which'),
    (b'\x8e' + b'\xff' * 8, 'too early'), (b'\x95' + b'\xff' * 8, 'too early'),
    (b'\x8a\xff', 'too early'),
    (shared(60, b'}'), 'in two places'), (shared(60, b'('), 'holds a tuple'),
    (b'}X\x01\x00\x00\x00a(' + shared(60, b'(') + b'ts', None),
    (b't', 'lacks its operands'),
    (b'(NR', 'lacks its operands'), (b'NN\x86q\x00', 'holds a tuple'),
    (b'NNb', 'attributes of what has none'),
    (b'cnumpy\nndarray\n}b', 'attributes of what has none'), (b'NNa', 'appends to what is no list'),
    (b'cnumpy\nndarray\n', 'holds a numpy.ndarray'), (b'Ncnumpy\nndarray\n', 'numpy.ndarray')])
def test_pickles_that_no_writer_makes(tmp_path, content, words):
    """None of these takes memory or time beyond its size, or ends the process."""
    (tmp_path / 'x.pickle').write_bytes(b'\x80\x02' + content + b'.')
    if words is None:
        assert read_arrays(tmp_path / 'x.pickle') == {}
    else:
        with pytest.raises(UserError, match=rf'x\.pickle .*{words}'):
            read_arrays(tmp_path / 'x.pickle')


def test_a_file_does_not_change_how_the_next_is_read(tmp_path):
    """Attributes set on a name of numpy or torch stay in their file."""
    good = pickle.dumps({'a': np.arange(3.0)}, 2)
    for name in ('cnumpy\ndtype\n', 'cnumpy.core.multiarray\n_reconstruct\n', 'ctorch\nFloatStorage\n'):
        for state in (b'}X\x04\x00\x00\x00codeX\x02\x00\x00\x00i4sb', b'NX\x01\x00\x00\x00<\x86b'):
            (tmp_path / 'bad.pickle').write_bytes(b'\x80\x02' + name.encode() + state + b'.')
            with pytest.raises(UserError, match='bad.pickle'):
                read_arrays(tmp_path / 'bad.pickle')
            (tmp_path / 'good.pickle').write_bytes(good)
            assert read_arrays(tmp_path / 'good.pickle')['a'].tolist() == [0, 1, 2]
