"""PyTorch names and layouts -> our tree: values by hand, goldens, diffusers, and everything a file can get
wrong."""
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from goldens import weights
from safetensors.numpy import save_file
from torch_samples import LINEAR, SOFTMAX, random_state, tiny_arch, to_diffusers

from lit_jax.convert.torch_arch import check_expected, infer_arch, parse_arch_name
from lit_jax.convert.torch_export import to_torch_state, torch_layout
from lit_jax.convert.torch_files import METADATA_KEY, Source, TensorInfo, source_from_arrays
from lit_jax.convert.torch_import import convert, from_torch_state, read_params
from lit_jax.convert.torch_survey import Hints
from lit_jax.models.facts import has_null_class
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves


def assert_trees_equal(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and np.array_equal(a[path], b[path]), path


@pytest.mark.parametrize('name', ['dit_a', 'dit_p4', 'lit_model', 'lit_model_bias'])
def test_goldens_import_and_return(goldens, name):
    """Shapes, architecture and values of the official models; back again bit for bit, also the position
    table."""
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    config, state = meta['config'], {**state, 'pos_embed': arrays['out_pos_embed'].astype(np.float32)}
    state['pos_embed'] = state['pos_embed'].reshape(1, -1, config['width'])
    # LiT shows its heads in the depth-wise convolution, DiT of this size shows them nowhere.
    arch, params = from_torch_state(state, heads=None if 'kernel' in config else config['heads'])
    assert arch['mixer']['heads'] == config['heads'] and arch['input_size'] == [config['input']] * 2
    assert (arch['depth'], arch['width'],
            arch['patch']) == (config['depth'], config['width'], config['patch'])
    assert arch['num_classes'] == config['classes'] and arch['learn_sigma'] and arch['mlp_ratio'] == 4.0
    assert arch['mixer']['qkv_bias'] == config.get('bias', True)
    assert arch['mixer'].get('dwc_kernel') == config.get('kernel')
    back = to_torch_state(params, arch)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize('mixer',
                         [SOFTMAX, {**SOFTMAX, 'qkv_bias': False}, LINEAR, {**LINEAR, 'qkv_bias': True},
                          {**LINEAR, 'dwc_kernel': 0}])
def test_tree_is_the_one_of_the_network(mixer):
    """The key tables' leaves are exactly the network's, so that no leaf can be left out on either side."""
    arch = tiny_arch(mixer)
    _, params = from_torch_state(random_state(arch), arch)
    expected = {path: leaf.shape for path, leaf in named_leaves(Network(arch).abstract()).items()}
    assert {path: leaf.shape for path, leaf in named_leaves(params).items()} == expected


def test_values_land_where_the_layout_says():
    """One element of each kind, found by its meaning rather than by the transform's formula."""
    arch = tiny_arch()
    state = random_state(arch)
    _, params = from_torch_state(state, arch)
    # k of head 1, channel 3, from input 5, in block 1: row D + 1·E + 3 of qkv.
    assert params['blocks']['attn']['qkv']['kernel'][1, 5, 1, 1,
                                                     3] == state['blocks.1.attn.qkv.weight'][16 + 8 + 3, 5]
    assert params['blocks']['attn']['qkv']['bias'][1, 2, 0, 3] == state['blocks.1.attn.qkv.bias'][32 + 3]
    assert params['blocks']['attn']['proj']['kernel'][0, 1, 3,
                                                      5] == state['blocks.0.attn.proj.weight'][5, 8 + 3]
    # gate_mlp is the last sixth of the modulation.
    assert params['blocks']['adaLN']['kernel'][0, 2, 5,
                                               7] == state['blocks.0.adaLN_modulation.1.weight'][
                                                   5 * 16 + 7, 2]
    assert params['x_embedder']['kernel'][1, 0, 3, 9] == state['x_embedder.proj.weight'][9, 3, 1, 0]
    assert params['y_embedder']['table'][3, 1] == state['y_embedder.embedding_table.weight'][3, 1]
    linear = tiny_arch(LINEAR)
    state = random_state(linear)
    _, params = from_torch_state(state, linear)
    assert params['blocks']['attn']['kv']['kernel'][1, 5, 1, 1,
                                                    3] == state['blocks.1.attn.kv.weight'][16 + 8 + 3, 5]
    assert params['blocks']['attn']['dwc']['kernel'][1, 2, 0, 0,
                                                     6] == state['blocks.1.attn.dwc.weight'][6, 0, 2, 0]


def test_diffusers_names_give_the_same_tree():
    arch = tiny_arch()
    state = random_state(arch)
    _, params = from_torch_state(state, arch)
    inferred, folded = from_torch_state(to_diffusers(state, 2), heads=2, input_size=(4, 4))
    assert inferred == arch
    assert_trees_equal(params, folded)


def test_diffusers_copies_must_agree():
    state = to_diffusers(random_state(tiny_arch()), 2)
    state['transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias'][0] += 1
    with pytest.raises(UserError, match=r'differing tensor: transformer_blocks\.1\.norm1.*linear_2\.bias'):
        from_torch_state(state, heads=2, input_size=(4, 4))


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype):
    arch = tiny_arch()
    state = {key: value.astype(dtype) for key, value in random_state(arch).items()}
    inferred, params = from_torch_state(state, heads=2)
    assert inferred == arch
    kernel = params['blocks']['mlp']['fc1']['kernel']
    assert kernel.dtype == np.float32
    assert np.array_equal(kernel[0], state['blocks.0.mlp.fc1.weight'].astype(np.float32).T)


def test_position_table_is_compared():
    """Within 1e-4 (other libraries' sines) it passes, a table of something else does not."""
    arch = tiny_arch()
    state = random_state(arch)
    state['pos_embed'] = state['pos_embed'] + np.float32(5e-5)
    from_torch_state(state, arch)
    state['pos_embed'] = state['pos_embed'] + np.float32(5e-4)
    with pytest.raises(UserError, match='not the sin-cos table of a 2x2 grid'):
        from_torch_state(state, arch)


@pytest.mark.parametrize('size', [[4, 4], [4, 12], [8, 2], [2, 8]])
def test_grid_is_read_off_the_position_table(size):
    arch = tiny_arch(input_size=size)
    assert from_torch_state(random_state(arch), heads=2)[0]['input_size'] == size


def test_all_problems_are_told_at_once():
    state = random_state(tiny_arch(LINEAR))
    del state['blocks.0.mlp.fc2.bias'], state['blocks.1.mlp.fc2.bias'], state['final_layer.linear.weight']
    state['blocks.1.attn.q.weight'] = state['blocks.1.attn.q.weight'][:-1]
    state['x_embedder.proj.bias'][3] = np.nan
    state['t_embedder.mlp.0.bias'] = state['t_embedder.mlp.0.bias'].astype(np.int64)
    state['t_embedder.mlp.2.bias'] = state['t_embedder.mlp.2.bias'].astype(np.float64)
    state['blocks.0.attn.qkv.weight'] = np.ones((2, 2), np.float32)
    state['module.y_embedder.embedding_table.weight'] = state['y_embedder.embedding_table.weight']
    state['blocks.1.attn.kv.weight'][0, 0] = np.inf
    with pytest.raises(UserError) as error:
        from_torch_state(state)
    text = str(error.value)
    for line in ('missing tensor: blocks.{0-1}.mlp.fc2.bias', 'missing tensor: final_layer.linear.weight',
                 'misshaped tensor: blocks.1.attn.q.weight has (15, 16), expected (16, 16)',
                 'non-finite values in tensor: x_embedder.proj.bias',
                 'non-finite values in tensor: blocks.1.attn.kv.weight',
                 'wrong dtype in tensor: t_embedder.mlp.0.bias is int64',
                 'wrong dtype in tensor: t_embedder.mlp.2.bias is float64',
                 'unexpected tensor: blocks.0.attn.qkv.weight',
                 'duplicate tensor: y_embedder.embedding_table.weight'):
        assert line in text
    assert text.count('tensor:') == 9       # and nothing that is not wrong


def test_missing_tensors_that_carry_a_size_are_named():
    state = random_state(tiny_arch(LINEAR))
    for key in ('x_embedder.proj.weight', 'y_embedder.embedding_table.weight', 'pos_embed'):
        del state[key]
    with pytest.raises(UserError) as error:
        from_torch_state(state)
    for key in ('x_embedder.proj.weight', 'y_embedder.embedding_table.weight', 'pos_embed'):
        assert f'missing tensor: {key}' in str(error.value)


def test_one_misshaped_tensor_does_not_mislead_the_rest():
    state = random_state(tiny_arch(LINEAR))
    state['x_embedder.proj.bias'] = np.zeros(24, np.float32)
    with pytest.raises(UserError) as error:
        from_torch_state(state)
    assert str(error.value).count('misshaped') == 1


def test_heads_must_be_told_where_nothing_shows_them():
    state = random_state(tiny_arch())
    with pytest.raises(UserError, match='give --heads N'):
        from_torch_state(state)
    with pytest.raises(UserError, match='5 heads do not divide the width 16'):
        from_torch_state(state, heads=5)
    with pytest.raises(UserError, match='the model has 2 heads, not 4'):
        from_torch_state(random_state(tiny_arch(LINEAR)), heads=4)


def test_a_network_that_cannot_be_is_told_with_the_rest():
    state = random_state(tiny_arch())
    del state['pos_embed']
    with pytest.raises(UserError,
                       match=r'(?s)give --heads N.*input size \(5, 5\) is not divisible by patch 2'):
        from_torch_state(state, input_size=(5, 5))


def test_heads_of_known_sizes_come_from_the_table():
    """DiT-XL's 16 heads, from shapes alone; the values are never read, so none exist."""
    arch = tiny_arch({**SOFTMAX, 'heads': 16}, depth=28, width=1152, input_size=[32, 32], num_classes=1000)
    layout = {key: shape for key, shape in torch_layout(arch).items() if key != 'pos_embed'}
    source = Source({key: TensorInfo(shape, 'float32') for key, shape in layout.items()})
    inferred = infer_arch(source, 'file', Hints(input_size=(32, 32)))
    assert inferred.arch == arch and not inferred.problems


@pytest.mark.parametrize('keys, word', [
    (['blocks.0.scale_shift_table', 'attention_y_norm.weight'], 'looks like Sana'),
    (['caption_norm.weight', 'transformer_blocks.0.attn1.to_q.weight'], 'looks like Sana'),
    (['csize_embedder.mlp.0.weight', 'blocks.0.attn.qkv.weight'],
     'looks like PixArt-α at 1024 pixels, with its micro conditions'),
    (['adaln_single.emb.resolution_embedder.linear_1.weight'], 'looks like PixArt-α at 1024'),
    (['joint_blocks.0.x_block.attn.qkv.weight'], 'looks like Stable Diffusion 3'),
    (['down_blocks.0.resnets.0.conv1.weight'], 'U-Net'),
    (['layer1.0.conv1.weight'], 'is no checkpoint of DiT, LiT'),
    ([], 'found none'),
])
def test_other_models_are_named(keys, word):
    with pytest.raises(UserError, match=word):
        from_torch_state({key: np.zeros((2, 2), np.float32) for key in keys})


def test_absurd_block_numbers_are_refused_before_anything_is_allocated():
    state = random_state(tiny_arch(LINEAR))
    state['blocks.999999999.mlp.fc1.bias'] = state['blocks.0.mlp.fc1.bias']
    with pytest.raises(UserError, match='numbers its blocks up to 999999999'):
        from_torch_state(state)


def test_given_arch_is_the_measure():
    with pytest.raises(UserError,
                       match=r'misshaped tensor: blocks\.\{0-1\}\.mlp\.fc1\.weight has \(32, 16\)'):
        from_torch_state(random_state(tiny_arch(mlp_ratio=2.0)), tiny_arch())


def test_expected_names_sizes_and_pixels():
    xl = tiny_arch({**SOFTMAX, 'heads': 16}, depth=28, width=1152, input_size=[64, 64])
    with pytest.raises(UserError) as error:
        check_expected(xl, {**parse_arch_name('lit_s_4'), 'image_size': 256}, 'DiT-XL-2-512x512.pt',
                       downscale=8)
    text = str(error.value)
    assert 'XL weights (depth 28, width 1152) there, S weights (depth 12, width 384) asked for' in text
    assert 'trained for 512x512 pixels (latent 64x64), asked for 256x256 pixels (latent 32x32)' in text
    assert 'mixer: softmax there, linear asked for' in text and 'patch: 2 there, 4 asked for' in text
    check_expected(xl, {**parse_arch_name('DiT-XL/2'), 'image_size': 512, 'heads': None}, 'file', downscale=8)


@pytest.mark.parametrize('name, expected', [
    ('dit_xl', {'family': 'dit', 'depth': 28, 'width': 1152, 'mixer': 'softmax'}),
    ('LiT-S/2', {'family': 'dit', 'depth': 12, 'width': 384, 'mixer': 'linear', 'patch': 2}),
    ('lit_xl_512', {'family': 'dit', 'depth': 28, 'width': 1152, 'mixer': 'linear', 'image_size': 512}),
    ('PixArt-XL/2', {'family': 'pixart', 'depth': 28, 'width': 1152, 'mixer': 'softmax', 'patch': 2}),
    ('lit_t2i_1024', {'family': 'pixart', 'depth': 28, 'width': 1152, 'mixer': 'linear', 'image_size': 1024}),
])
def test_arch_names(name, expected):
    assert parse_arch_name(name) == expected


@pytest.mark.parametrize('name', ['dit', 'dit_xxl', 'unet', 'dit_xl_'])
def test_unknown_arch_names(name):
    with pytest.raises(UserError, match='unknown architecture'):
        parse_arch_name(name)


# ------------------------------------------------------------------------------------------------------
# What no tensor shows, and numbers that no file can hold


def named_source(state, **told) -> Source:
    source = source_from_arrays(state)
    source.told = told
    return source


@pytest.mark.parametrize('rows, told, hints, classes, null', [
    (4, {}, {}, 3, True), (4, {'num_classes': 3}, {}, 3, True), (4, {'num_classes': 4}, {}, 4, False),
    (4, {}, {'num_classes': 4}, 4, False), (4, {'num_classes': 4}, {'num_classes': 3}, 3, True),
    (1, {}, {}, 1, False)])
def test_label_tables_with_and_without_a_null_row(rows, told, hints, classes, null):
    state = random_state(tiny_arch())
    state['y_embedder.embedding_table.weight'] = np.arange(16.0 * rows, dtype=np.float32).reshape(rows, 16)
    inferred = infer_arch(named_source(state, **told), 'x', Hints(heads=2, **hints))
    assert inferred.arch['num_classes'] == classes and has_null_class(inferred.arch) == null
    assert bool(inferred.notes) == (not null or not told and not hints) and not inferred.problems
    params, _ = read_params(source_from_arrays(state), inferred, 'x')
    table = params['y_embedder']['table']
    assert len(table) == classes + 1 and (null or not table[-1].any())
    back = to_torch_state(params, inferred.arch)
    assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)
    assert torch_layout(inferred.arch)['y_embedder.embedding_table.weight'] == (rows, 16)
    pair = Network(inferred.arch).guidance_pair
    if null:
        assert pair({'label': np.zeros(2, np.int32)})[1]['label'].tolist() == [classes] * 2
    else:
        with pytest.raises(UserError, match='trained without dropping classes.*--cfg_scale 1'):
            pair({'label': np.zeros(2, np.int32)})


def test_a_label_table_that_the_file_itself_contradicts():
    inferred = infer_arch(named_source(random_state(tiny_arch()), num_classes=9), 'x', Hints(heads=2))
    assert inferred.problems == ['it was trained with --num-classes 9, but its label table has 4 rows']


def test_a_model_that_predicts_noise_alone():
    state = random_state(tiny_arch(learn_sigma=False))
    arch, params = from_torch_state(state, heads=2)
    assert arch['learn_sigma'] is False and params['final_layer']['linear']['kernel'].shape == (16, 16)


@pytest.mark.parametrize('name, value', [
    ('depth', 2 ** 31), ('depth', 5000), ('width', 2 ** 40), ('width', 2 ** 16), ('num_classes', 2 ** 50),
    ('num_classes', 10 ** 6), ('input_size', [2 ** 40, 4]), ('input_size', [2 ** 15, 2 ** 15]),
    ('input_size', 4), ('mlp_ratio', 'x'), ('mlp_ratio', 1000.0), ('patch', 0), ('channels', [4]),
    ('mixer', 'softmax'), ('mixer', {'name': 'softmax', 'heads': [2]}), ('stages', [{'depth': 2 ** 40}]),
    ('learn_sigma', 1), ('null_class', 'no'), ('width', float('inf')), ('depth', True)])
def test_numbers_of_metadata_are_bounded_by_the_file(tmp_path, name, value):
    """In bytes: none of these may size an array (2^31 blocks would take 2 TiB)."""
    metadata = {METADATA_KEY: json.dumps({'model': {**tiny_arch(), name: value}})}
    save_file(random_state(tiny_arch()), tmp_path / 'x.safetensors', metadata=metadata)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r'x\.safetensors'):
            convert(tmp_path / 'x.safetensors', tmp_path / 'out')
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    assert not (tmp_path / 'out').exists()


def test_names_from_files_are_shown_escaped_and_short():
    state = random_state(tiny_arch())
    state['a\x1b[31m' + 'x' * 500] = np.ones(1, np.float32)
    for number in range(100):
        state[f'more{number}'] = np.ones(1, np.float32)
    with pytest.raises(UserError) as error:
        from_torch_state(state, heads=2)
    assert '\x1b' not in str(error.value) and len(str(error.value)) < 4000
    assert 'a\\x1b[31mxxx' in str(error.value) and '... and 71 more' in str(error.value)
