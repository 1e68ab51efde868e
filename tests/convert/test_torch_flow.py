"""Files of flows: told from DiT's by what differs, converted both ways, refused as each other."""
from pathlib import Path

import numpy as np
import pytest
from torch_samples import random_state, tiny_arch

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.checkpoint.projector_file import read_file
from lit_jax.convert.torch_export import export, write_safetensors
from lit_jax.convert.torch_files import open_source, source_from_arrays
from lit_jax.convert.torch_flow import find_diffusion, join_blocks, take_projectors
from lit_jax.convert.torch_import import convert, describe
from lit_jax.runtime.errors import UserError

DDPM = {'kind': 'ddpm', 'steps': 1000, 'schedule': 'linear'}
PLAIN = Path('model.pt')


def source(state=None, **told):
    found = source_from_arrays(state or {})
    found.told.update(told)
    return found


def untrained_half(state):
    """SiT's output layer: every second half of the channels of a pixel is zero."""
    unused = np.arange(len(state['final_layer.linear.bias'])) % 8 >= 4
    return {**state, **{f'final_layer.linear.{end}': np.where(
        unused.reshape(-1, *[1] * (state[f'final_layer.linear.{end}'].ndim - 1)), np.float32(0),
        state[f'final_layer.linear.{end}']) for end in ('weight', 'bias')}}


@pytest.mark.parametrize('told, name, wanted', [
    ({'prediction': 'velocity', 'path_type': 'Linear'}, 'x.pt', ('linear', 'velocity', 0)),
    ({'path_type': 'GVP', 'prediction': 'noise', 'loss_weight': 'likelihood'}, 'x.pt', ('gvp', 'noise', 0)),
    ({'path_type': 'cosine', 'prediction': 'v', 'encoder_depth': 8}, 'x.pt', ('cosine', 'velocity', 1)),
    ({'model': 'SiT-XL/2'}, 'x.pt', ('linear', 'velocity', 0)),
    ({}, 'SiT-XL-2-256x256.pt', ('linear', 'velocity', 0))])
def test_a_flow_says_so(told, name, wanted):
    section, _ = find_diffusion(source(**told), Path(name))
    assert (section['path'], section['prediction'], section['noise_at']) == wanted
    with pytest.raises(UserError, match='was asked for as DiT; leave --system out'):
        find_diffusion(source(**told), Path(name), 'dit')


def test_a_dit_says_so():
    for told, name in (({'model': 'DiT-XL/2', 'num_classes': 1000}, 'x.pt'), ({}, 'DiT-XL-2-256x256.pt'),
                       ({'prediction': 'epsilon', 'model': 'DiT-S/2'}, 'x.pt')):
        assert find_diffusion(source(**told), Path(name))[0] == DDPM
        with pytest.raises(UserError, match='is a DiT .* and was asked for as SiT'):
            find_diffusion(source(**told), Path(name), 'sit')


def test_where_nothing_says_so_the_unused_half_of_the_outputs_does():
    state = random_state(tiny_arch())
    assert find_diffusion(source(state), PLAIN)[0] == DDPM
    section, why = find_diffusion(source(untrained_half(state)), PLAIN)
    assert section['kind'] == 'flow' and 'was never trained' in why


def test_where_nothing_differs_it_is_asked():
    state = random_state(tiny_arch(learn_sigma=False))
    with pytest.raises(UserError, match='nothing tells .*: say --system dit, sit, repa or lightningdit'):
        find_diffusion(source(state), PLAIN)
    assert find_diffusion(source(state), PLAIN, 'dit')[0] == DDPM
    assert find_diffusion(source(state), PLAIN, 'repa')[0]['noise_at'] == 1


@pytest.mark.parametrize('told, message', [
    ({'path_type': 'Quadratic'}, "--path-type 'Quadratic', which this version does not know; known: linear"),
    ({'path_type': 'Linear', 'prediction': 'x1'}, "--prediction 'x1'")])
def test_an_unknown_path_or_prediction_is_refused(told, message):
    with pytest.raises(UserError, match=message):
        find_diffusion(source(**told), PLAIN)


def save(path, state):
    with open(path, 'wb') as file:
        write_safetensors(file, {key: value.shape for key, value in state.items()}, iter(state.values()), {})
    return path


def projectors(width, last=5):
    rng = np.random.default_rng(4)
    sides = (width, 7), (7, 7), (7, last)
    return {f'projectors.0.{2 * layer}.{end}': rng.standard_normal(
        (sides[layer][1], sides[layer][0])[:2 if end == 'weight' else 1]).astype(np.float32)
        for layer in range(3) for end in ('weight', 'bias')}


def test_a_repa_there_and_back_with_its_projectors(tmp_path):
    state = random_state(tiny_arch(learn_sigma=False)) | projectors(16)
    done = convert(save(tmp_path / 'last.safetensors', state), tmp_path / 'repa', heads=2)
    assert 'velocity of a flow on the linear path, noise at time 1 (assumed, as of REPA' in describe(done)
    config, _ = load_model_folder(tmp_path / 'repa')
    assert config['diffusion']['kind'] == 'flow' and config['projectors'] == {'encoder_depth': None}
    kept = read_file(tmp_path / 'repa')
    export(tmp_path / 'repa', tmp_path / 'back.safetensors')
    back = open_source(tmp_path / 'back.safetensors')
    assert set(back.tensors) == set(state) and set(kept) == set(projectors(16))
    for key, value in state.items():
        np.testing.assert_array_equal(back.read(key), value)
    export(tmp_path / 'repa', tmp_path / 'lit', layout='lit')
    for source in 'back.safetensors', 'lit':
        convert(tmp_path / source, tmp_path / 'again', overwrite=True)
        again, _ = load_model_folder(tmp_path / 'again')
        assert again['diffusion'] == config['diffusion'] and set(read_file(tmp_path / 'again')) == set(kept)


def test_blocks_of_an_early_repa_are_counted_on():
    state = random_state(tiny_arch(learn_sigma=False))
    late = {key.replace('blocks.1.', 'decoder_blocks.0.'): value for key, value in state.items()}
    found = source(late)
    join_blocks(found)
    assert set(found.tensors) == set(state) != set(late)
    np.testing.assert_array_equal(found.read('blocks.1.attn.qkv.bias'), state['blocks.1.attn.qkv.bias'])


def test_projectors_that_are_not_whole_are_refused():
    whole = projectors(16)
    broken = {key: value for key, value in whole.items() if key != 'projectors.0.2.bias'}
    broken['projectors.0.4.bias'] = whole['projectors.0.4.bias'] * np.nan
    said = r'(?s)non-finite .*0\.4\.bias.*missing tensor: projectors\.0\.2\.bias'
    with pytest.raises(UserError, match=said):
        take_projectors(source(broken), PLAIN)
