"""The converter beyond DiT and LiT: official MoH-DiT, compressed keys, and the round trip of every system."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights
from safetensors.numpy import save_file
from tiers import BOTH_WIDTHS
from torch_samples import SOFTMAX, random_params, random_state, tiny_arch

from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_arch import check_expected, infer_arch, parse_arch_name, plain_arch
from lit_jax.convert.torch_export import export_params, to_torch_state, torch_layout
from lit_jax.convert.torch_files import Source, TensorInfo
from lit_jax.convert.torch_import import convert as convert_file
from lit_jax.convert.torch_import import from_torch_state
from lit_jax.convert.torch_survey import Hints
from lit_jax.models.mixers import MIXERS
from lit_jax.models.network import Network
from lit_jax.recipes.systems import SYSTEMS
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

MOH = {'name': 'moh', 'heads': 2, 'shared': 1, 'routed': 1, 'head_dim': 8, 'qkv_bias': True}
MOH_STAGES = [{'depth': 1, 'mixer': {'heads': 2, 'shared': 2, 'routed': 0}},
              {'depth': 2, 'mixer': {'heads': 5, 'shared': 2, 'routed': 2}}]
# One little model of every system whose layout is not DiT's.
# Families without runs of unlike blocks have no field `stages`.
MODELS = {
    'moh': tiny_arch({**MOH, **MOH_STAGES[0]['mixer']}, depth=3, stages=MOH_STAGES),
    'compressed': tiny_arch(depth=3, input_size=[8, 8],
                            stages=[{'depth': 1}, {'depth': 2, 'mixer': {'compress': 2}}]),
    'edit': tiny_arch({'name': 'edit', 'heads': 2, 'ratio': 0.5}),
    'dig': tiny_arch({'name': 'gla', 'heads': 2, 'expand_k': 0.5}, family='dig', depth=4, ffn='swiglu',
                     skip='skip'),
    'dig of the paper': tiny_arch({'name': 'gla', 'heads': 2, 'value_gate': True, 'norm': 'layer',
                                   'gate_bias': True},
                                  family='dig', ffn='swiglu'),
    'udig': tiny_arch({'name': 'gla', 'heads': 1}, family='udig', depth=5, ffn='swiglu', width=8,
                      input_size=[8, 8]),
    'sana': tiny_arch({'name': 'sana', 'heads': 2, 'qkv_bias': False}, ffn='mix'),
    'dydila': tiny_arch({'name': 'dydila', 'heads': 1}, ffn='mix'),
    'focused': tiny_arch({'name': 'linear', 'heads': 2, 'focus_power': 3, 'focus_scale': True,
                          'key_grid': [2, 2]}),
}
for arch in MODELS.values():
    if arch['family'] != 'dit':
        del arch['stages']
EVERY_MODEL = pytest.mark.parametrize('name', MODELS)


def inferred_from_shapes(model, **hints):
    """What infer_arch says of the tensors' shapes alone: the values are never read, so none exist."""
    arch = plain_arch({'input_size': [32, 32], 'channels': 4, 'num_classes': 1000, **model})
    layout = {key: shape for key, shape in torch_layout(arch).items() if key != 'pos_embed'}
    source = Source({key: TensorInfo(shape, 'float32') for key, shape in layout.items()})
    return infer_arch(source, 'file', Hints(input_size=(32, 32), **hints)), arch


# ------------------------------------------------------------------------------------------------------
# MoH-DiT


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['moh_mixed', 'moh_headdim'])
def test_the_official_moh_dit(name, wide, goldens):
    """Imported, it gives the official output; heads, shared heads and head dims are read off the file, layer
    by layer."""
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    case = meta['config']
    state = {**state, 'pos_embed': arrays['out_pos_embed'].astype(np.float32).reshape(1, -1, case['width'])}
    arch, params = from_torch_state(state, routed=tuple(case['routed']))
    layers = [{**arch['mixer'], **stage['mixer']} for stage in arch['stages'] for _ in range(stage['depth'])]
    assert [(layer['heads'], layer['shared'], layer['routed']) for layer in layers] == [
        *zip(case['heads'], case['shared'], case['routed'], strict=True)]
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        x, t = (np.asarray(arrays[f'in_{key}'], dtype) for key in ('x', 't'))
        args = (x.transpose(0, 2, 3, 1), t, {'label': np.asarray(arrays['in_y'], jnp.int32)})
        network = Network(arch, dtype=dtype)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
        got, seen = jax.jit(lambda p, x, t, cond: network.observe(p, x, t, cond, ('balance',)))(params, *args)
        want = arrays['out64_eps_v'].transpose(0, 2, 3, 1)
        assert np.abs(got - want).max() <= (1e-9 if wide else 2e-5) * np.abs(want).max()
        losses = np.concatenate(seen['balance'])
        np.testing.assert_allclose(losses, arrays['out64_aux_losses'], rtol=1e-9 if wide else 2e-5)
    back = to_torch_state(params, arch)
    assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)


def test_how_many_routed_heads_a_token_uses_must_be_told():
    state = random_state(MODELS['moh'])
    with pytest.raises(UserError,
                       match=r'this is none of the published sizes of MoH-DiT; give '
                             r'--routed N, or --routed N,N'):
        from_torch_state(state)
    arch, _ = from_torch_state(state, routed=(2,))       # a layer without a choice takes none
    assert arch == MODELS['moh']
    with pytest.raises(UserError, match='MoH-DiT shows its heads'):
        from_torch_state(state, routed=(2,), heads=2)
    with pytest.raises(UserError, match='number for each of the 3 layers'):
        from_torch_state(state, routed=(2, 1))


@pytest.mark.parametrize('size', SYSTEMS['moh_dit'].sizes)
def test_published_sizes_of_moh_dit_are_known(size):
    inferred, arch = inferred_from_shapes(SYSTEMS['moh_dit'].sizes[size])
    assert not inferred.problems and inferred.arch['mixer'] == arch['mixer']
    # Runs of layers with the same heads are one, wherever the recipe cuts them.
    def layers(arch):
        return [{**arch['mixer'], **stage.get('mixer', {})} for stage in arch['stages']
                for _ in range(stage['depth'])]

    assert layers(inferred.arch) == layers(arch)
    check_expected(inferred.arch, {**parse_arch_name(f'moh_dit_{size}'), 'image_size': 256}, 'file',
                   downscale=8)


def test_another_size_of_moh_than_the_one_asked_for():
    inferred, _ = inferred_from_shapes(SYSTEMS['moh_dit'].sizes['b'])
    with pytest.raises(UserError, match='its layers have other mixers than those asked for'):
        check_expected(inferred.arch, parse_arch_name('moh_dit_b_75'), 'file')


# ------------------------------------------------------------------------------------------------------
# DiG


@BOTH_WIDTHS
@pytest.mark.parametrize('name', ['dig_d4', 'dig_d8', 'dig_d8_skip'])
def test_the_official_dig(name, wide, goldens):
    """Imported with nothing told, it gives the official output, and goes back bit for bit."""
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    case = meta['config']
    state = {**state, 'pos_embed': arrays['out_pos_embed'].astype(np.float32).reshape(1, -1, case['width'])}
    arch, params = from_torch_state(state)
    assert (arch['family'], arch['mixer']['name'], arch['ffn']) == ('dig', 'gla', 'swiglu')
    assert (arch['depth'], arch['width'],
            arch['mixer']['heads']) == (case['depth'], case['width'], case['heads'])
    assert arch['skip'] == ('skip' if case['skip'] else 'none') and arch['input_size'] == [case['input']] * 2
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        x, t = (np.asarray(arrays[f'in_{key}'], dtype) for key in ('x', 't'))
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
        network = Network(arch, dtype=dtype)
        got = jax.jit(network.apply)(params, x.transpose(0, 2, 3, 1), t,
                                     {'label': np.asarray(arrays['in_y'], jnp.int32)})
        want = arrays['out64_eps_v'].transpose(0, 2, 3, 1)
        assert np.abs(got - want).max() <= (1e-9 if wide else 2e-5) * np.abs(want).max()
    back = to_torch_state(params, arch)
    assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize('size', SYSTEMS['dig'].sizes)
def test_every_size_of_dig_is_read_off_its_shapes(size):
    inferred, arch = inferred_from_shapes(SYSTEMS['dig'].sizes[size])
    assert not inferred.problems and inferred.arch == arch
    check_expected(inferred.arch, {**parse_arch_name(f'dig_{size}'), 'image_size': 256}, 'file', downscale=8)


def test_skip_layers_are_those_of_the_last_blocks():
    shapes = torch_layout(MODELS['dig'])
    assert [block for block in range(4) if f'blocks.{block}.skip_linear.weight' in shapes] == [3]
    state = random_state(MODELS['dig'])
    _, params = from_torch_state(state, MODELS['dig'])
    assert params['joins']['kernel'][0, 5, 3] == state['blocks.3.skip_linear.weight'][3, 5]
    assert params['blocks']['dwc']['kernel'][2, 0, 1, 0, 7] == state['blocks.2.dw_conv.weight'][7, 0, 0, 1]
    # The second half of gate_proj is what the first half gates.
    assert params['blocks']['mlp']['gate']['kernel'][1, 3, 1,
                                                     9] == state['blocks.1.mlp.gate_proj.weight'][256 + 9, 3]


def test_a_mlp_that_is_no_swiglu_is_told():
    state = random_state(MODELS['dig'])
    for block in range(4):
        state[f'blocks.{block}.mlp.gate_proj.weight'] = np.zeros((200, 16), np.float32)
        state[f'blocks.{block}.mlp.down_proj.weight'] = np.zeros((16, 100), np.float32)
    with pytest.raises(UserError, match='the SwiGLU has 100 inner channels; multiples of 256'):
        from_torch_state(state)


# ------------------------------------------------------------------------------------------------------
# Compressed keys


def test_compressed_layers_are_seen():
    inferred, arch = inferred_from_shapes(SYSTEMS['dit_kv'].sizes['l'], heads=12)
    assert not inferred.problems and inferred.arch == arch


def test_compressed_keys_have_the_names_of_pixart():
    shapes = torch_layout(MODELS['compressed'])
    assert 'blocks.0.attn.sr.weight' not in shapes
    assert {key: shapes[f'blocks.2.attn.{key}']
            for key in ('sr.weight', 'sr.bias', 'norm.weight', 'norm.bias')} == {
'sr.weight': (16, 1, 2, 2), 'sr.bias': (16,), 'norm.weight': (16,), 'norm.bias': (16,)}
    state = random_state(MODELS['compressed'])
    arch, params = from_torch_state(state, heads=2)
    assert arch == MODELS['compressed']
    # Head 1, channel 3 of the second layer of the second run, tap (1, 0).
    assert params['blocks1']['attn']['compressor']['kernel'][1, 1, 0, 1,
                                                             3] == state['blocks.2.attn.sr.weight'][11, 0, 1,
                                                                                                    0]
    assert params['blocks1']['attn']['compressor']['norm_gain'][0, 1,
                                                                3] == state['blocks.1.attn.norm.weight'][11]
    assert params['blocks1']['mlp']['fc1']['bias'][1, 5] == state['blocks.2.mlp.fc1.bias'][5]


# ------------------------------------------------------------------------------------------------------
# Every system


def test_every_mixer_makes_the_round_trip():
    assert {arch['mixer']['name'] for arch in MODELS.values()} == set(MIXERS)


@EVERY_MODEL
def test_round_trips_are_bitwise(name):
    """jax -> torch -> jax; every tensor of every block once, and the layout is known without the weights."""
    arch = MODELS[name]
    params = random_params(arch)
    state = to_torch_state(params, arch)
    assert {key: value.shape for key, value in state.items()} == torch_layout(arch)
    _, back = from_torch_state(state, arch)
    expected = named_leaves(Network(arch).abstract())
    assert named_leaves(back).keys() == expected.keys()
    for path, leaf in named_leaves(back).items():
        assert np.array_equal(leaf, named_leaves(params)[path]) and leaf.shape == expected[path].shape, path


@EVERY_MODEL
def test_a_file_of_ours_carries_its_architecture(name, tmp_path):
    arch = plain_arch(Network(MODELS[name]).arch)
    params = random_params(arch)
    export_params(tmp_path / 'model.safetensors', {'format': 1, 'model': arch}, params)
    convert_file(tmp_path / 'model.safetensors', tmp_path / 'model')
    config, loaded = load_model_folder(tmp_path / 'model')
    assert config['model'] == arch
    for path, leaf in named_leaves(loaded).items():
        assert np.array_equal(leaf, named_leaves(params)[path]), path


def test_leaves_without_an_official_name_go_under_their_own():
    state = random_state(MODELS['edit'])
    params = random_params(MODELS['edit'])
    assert np.array_equal(state['blocks.1.attn.fusion.norm.gain'],
                          params['blocks']['attn']['fusion']['norm']['gain'][1])
    assert state['blocks.0.attn.k.linear.kernel'].shape == (16, 2, 8)
    assert 'blocks.0.mlp.fc1.weight' in state          # what DiT has keeps DiT's names


def test_without_metadata_the_tensors_that_no_model_has_are_named():
    with pytest.raises(UserError, match=r'unexpected tensor: blocks\.\{0-1\}\.attn\.fusion\.norm\.gain'):
        from_torch_state(random_state(MODELS['edit']), heads=2)


def test_the_script_imports_moh(convert, tmp_path, capsys):
    state = random_state(MODELS['moh'])
    save_file(state, tmp_path / 'moh.safetensors')
    with pytest.raises(UserError, match='give --routed N'):
        convert(tmp_path / 'moh.safetensors', '--out', tmp_path / 'moh')
    convert(tmp_path / 'moh.safetensors', '--routed', '2', '--out', tmp_path / 'moh')
    assert 'moh attention (heads 2, shared 2, routed 0, head_dim 8' in capsys.readouterr().out
    assert load_model_folder(tmp_path / 'moh')[0]['model'] == MODELS['moh']


def test_softmax_attention_of_one_rate_has_no_runs():
    arch = tiny_arch({**SOFTMAX, 'compress': 2}, input_size=[8, 8])
    assert from_torch_state(random_state(arch), heads=2)[0] == arch
