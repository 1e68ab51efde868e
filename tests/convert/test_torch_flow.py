"""Files of flows: told from DiT's by what differs, converted both ways, refused as each other."""
from pathlib import Path

import numpy as np
import pytest
import torch_files_by_hand as by_hand
from torch_samples import SOFTMAX, random_state, tiny_arch

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


def test_where_nothing_says_so_the_unused_half_of_the_outputs_does(caplog):
    state = random_state(tiny_arch())
    assert find_diffusion(source(state), PLAIN)[0] == DDPM
    section, why = find_diffusion(source(untrained_half(state)), PLAIN)
    assert section['kind'] == 'flow' and 'was never trained' in why
    with pytest.raises(UserError, match='asked for as DiT, but the second half of its outputs was never'):
        find_diffusion(source(untrained_half(state)), PLAIN, 'dit')
    assert find_diffusion(source(state), PLAIN, 'sit')[0]['kind'] == 'flow'
    assert 'taken for a SiT, as asked, but' in caplog.text


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


def trainers_file(path, ema, model, **more):
    """{model, ema, opt, ...} as the trainers write it."""
    parts, storages = {'opt': by_hand.dict_of({})}, {}
    for name, state in (('ema', ema), ('model', model)):
        entries = {}
        for key, array in state.items():
            entries[key] = by_hand.tensor(str(len(storages)), array.shape)
            storages[str(len(storages))] = np.ascontiguousarray(array).tobytes()
        parts[name] = by_hand.dict_of(entries)
    by_hand.write_zip(path, by_hand.dict_of(parts | more), storages)
    return path


YES = b'\x88'
TOLD_SIT = by_hand.namespace(model='SiT-XL/2', path_type='GVP', prediction='velocity')
TOLD_REPA = by_hand.namespace(model='SiT-XL/2', path_type='linear', encoder_depth=1, weighting='lognormal')
TOLD_LIGHTNING = by_hand.dict_of({'transport': by_hand.dict_of({
    'path_type': by_hand.text('Linear'), 'prediction': by_hand.text('velocity'), 'use_lognorm': YES,
    'use_cosine_loss': YES})})
LIGHTNING = tiny_arch({**SOFTMAX, 'rope': True}, patch=1, learn_sigma=False, ffn='swiglu_bias', norm='rms')
# Architecture, what stands beside the weights, and path, noise_at, times and cosine that it means.
TRAINERS = {
    'sit': (tiny_arch(), {'args': TOLD_SIT}, ('gvp', 0, 'uniform', 0.0)),
    'repa': (tiny_arch(learn_sigma=False), {'args': TOLD_REPA}, ('linear', 1, 'log_normal', 0.0)),
    'lightningdit': (LIGHTNING, {'config': TOLD_LIGHTNING}, ('linear', 0, 'logit_normal', 1.0))}


@pytest.mark.parametrize('system, wrapper', [
    ('sit', 'module.'), ('repa', '_orig_mod.'), ('lightningdit', 'module._orig_mod.')])
def test_a_trainers_file_there_and_back(system, wrapper, tmp_path):
    """Its EMA as it is, its model behind what DistributedDataParallel and torch.compile put before names."""
    arch, more, flow = TRAINERS[system]
    ema, model = (random_state(arch, seed) | (projectors(16) if system == 'repa' else {}) for seed in (1, 2))
    file = trainers_file(tmp_path / 'last.pt', ema, {wrapper + key: value for key, value in model.items()},
                         **more)
    for weights, state in (('ema', ema), ('model', model)):
        read = open_source(file, weights)
        assert set(read.tensors) == set(state) and read.weights == weights
        np.testing.assert_array_equal(read.read('pos_embed'), state['pos_embed'])
    convert(file, tmp_path / 'ours', weights='model', heads=2)
    section = load_model_folder(tmp_path / 'ours')[0]['diffusion']
    assert tuple(section[name] for name in ('path', 'noise_at', 'times', 'cosine')) == flow
    export(tmp_path / 'ours', tmp_path / 'back.safetensors')
    back = open_source(tmp_path / 'back.safetensors')
    assert set(back.tensors) == set(model)
    for key, value in model.items():
        np.testing.assert_allclose(back.read(key), value, rtol=0, atol=2e-7 if 'rope' in key else 0)


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
