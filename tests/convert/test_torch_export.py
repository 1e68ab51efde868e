"""Our tree -> PyTorch names, and the round trips, bit for bit."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch_samples import LINEAR, random_params, random_state, tiny_arch

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_export import (
    export,
    export_params,
    to_torch_state,
    torch_layout,
    write_safetensors,
)
from lit_jax.convert.torch_import import convert, from_torch_state
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import unsealed
from lit_jax.runtime.leaves import named_leaves


@st.composite
def archs(draw):
    """Small architectures of every kind that has names in PyTorch."""
    heads, head_dim = draw(st.sampled_from([(1, 8), (2, 4), (3, 8), (4, 2), (2, 6)]))
    patch = draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()):
        mixer = {'name': 'softmax', 'heads': heads, 'qkv_bias': draw(st.booleans())}
    else:
        mixer = {'name': 'linear', 'heads': heads, 'qkv_bias': draw(st.booleans()),
                 'dwc_kernel': draw(st.sampled_from([0, 3, 5])),
                 'activation': draw(st.sampled_from(['relu', 'gelu'])),
                 'focus_power': draw(st.sampled_from([0, 3]))}
    sides = [patch * draw(st.integers(1, 4)) for _ in range(2)]
    return tiny_arch(mixer, depth=draw(st.integers(1, 3)), width=heads * head_dim, patch=patch,
                     input_size=sides,
                     channels=draw(st.integers(1, 4)), num_classes=draw(st.integers(1, 5)),
                     mlp_ratio=draw(st.sampled_from([2.0, 4.0])), learn_sigma=draw(st.booleans()))


def bits(value):
    return np.ascontiguousarray(value).view(np.uint32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(arch=archs(), seed=st.integers(0, 2**32 - 1))
def test_round_trips_are_bitwise(arch, seed):
    """jax -> torch -> jax and torch -> jax -> torch; values over the whole range of float32, signed zeros
    included."""
    params = random_params(arch, seed)
    for leaf in named_leaves(params).values():
        leaf *= 10.0 ** np.random.default_rng(seed).integers(-30, 30, leaf.shape)
        leaf[..., 0] = -0.0
    state = to_torch_state(params, arch)
    assert {key: value.shape for key, value in state.items()} == torch_layout(arch)
    same, back = from_torch_state(state, arch)
    assert same == arch
    for path, leaf in named_leaves(params).items():
        assert np.array_equal(bits(leaf), bits(named_leaves(back)[path])), path
    again = to_torch_state(back, arch)
    assert list(again) == list(state)
    assert all(np.array_equal(bits(again[key]), bits(state[key])) for key in state)


def test_names_are_those_of_the_official_model():
    keys = list(torch_layout(tiny_arch(LINEAR, depth=1)))
    assert keys[:3] == ['pos_embed', 'x_embedder.proj.weight', 'x_embedder.proj.bias']
    assert keys[-1] == 'final_layer.linear.bias'
    assert {'blocks.0.attn.q.weight', 'blocks.0.attn.kv.weight', 'blocks.0.attn.dwc.weight',
            'blocks.0.attn.dwc.bias', 'blocks.0.adaLN_modulation.1.weight',
            't_embedder.mlp.2.bias'} < set(keys)


def test_file_carries_everything_back(tmp_path):
    """Folder -> .safetensors -> folder: what tensors do not show (heads, GELU, classes, latent) travels as
    metadata."""
    arch = tiny_arch({**LINEAR, 'dwc_kernel': 0, 'activation': 'gelu', 'focus_power': 3}, channels=1)
    config = {'format': 1, 'model': arch, 'diffusion': {'steps': 100, 'kind': 'linear'},
              'latent': {'space': 'pixels', 'vae': None, 'scale': 0.5, 'downscale': 1},
              'classes': ['a', 'b', 'c'], 'provenance': {'weights': 'ema', 'source': 'run'}}
    params = random_params(arch)
    local = {**config, 'recipe': {}, 'provenance': {'weights': 'ema', 'source': '/home/me/run'}}
    # a workdir's config: its paths stay at home
    export_params(tmp_path / 'model.safetensors', local, params)
    # the library reads what we wrote
    with safe_open(tmp_path / 'model.safetensors', framework='numpy') as file:
        assert unsealed(json.loads(file.metadata()['lit_jax']), 'it') == config
        assert all(np.array_equal(file.get_tensor(key), value)
                   for key, value in to_torch_state(params, arch).items())
        assert len(file.keys()) == len(torch_layout(arch))
    convert(tmp_path / 'model.safetensors', tmp_path / 'model')
    again, loaded = load_model_folder(tmp_path / 'model')
    assert {key: again[key] for key in ('model', 'diffusion', 'latent', 'classes')} == {
        key: config[key] for key in ('model', 'diffusion', 'latent', 'classes')}
    assert all(np.array_equal(leaf, named_leaves(loaded)[path])
               for path, leaf in named_leaves(params).items())
    export(tmp_path / 'model', tmp_path / 'again.safetensors')
    with safe_open(tmp_path / 'again.safetensors', framework='numpy') as file:
        assert all(np.array_equal(file.get_tensor(key), value)
                   for key, value in to_torch_state(params, arch).items())


@pytest.mark.peers
def test_torch_loads_our_export(tmp_path):
    """PyTorch's own loader gives the tensors under the official names."""
    from safetensors.torch import load_file
    arch = tiny_arch()
    export_params(tmp_path / 'model.safetensors', {'model': arch}, random_params(arch))
    state = load_file(tmp_path / 'model.safetensors')
    expected = random_state(arch)
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)


def test_output_in_the_way(tmp_path):
    with pytest.raises(UserError, match='must end in .safetensors'):
        export(tmp_path, tmp_path / 'model.pt')
    (tmp_path / 'there.safetensors').write_bytes(b'mine')
    with pytest.raises(UserError, match='exists already'):
        export(tmp_path, tmp_path / 'there.safetensors')
    assert (tmp_path / 'there.safetensors').read_bytes() == b'mine'


def test_failed_write_leaves_nothing(tmp_path):
    """Parameters that do not fit the architecture are found while writing: no part of a file remains."""
    params = random_params(tiny_arch())
    del params['y_embedder']
    with pytest.raises(UserError, match='y_embedder/table'):
        export_params(tmp_path / 'model.safetensors', {'model': tiny_arch()}, params)
    (tmp_path / 'file').write_text('no folder')
    with pytest.raises(UserError, match='cannot be written: something else stands there'):
        export_params(tmp_path / 'file' / 'model.safetensors', {'model': tiny_arch()},
                      random_params(tiny_arch()))
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_writer_refuses_a_tensor_that_is_not_as_announced(tmp_path):
    with open(tmp_path / 'x', 'wb') as file, pytest.raises(ValueError, match='the header says'):
        write_safetensors(file, {'w': (2, 3)}, iter([np.zeros((3, 2))]), {})
