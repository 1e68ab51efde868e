"""PixArt-Σ and LiT-0.6B: architectures read off files, both layouts both ways, and equal outputs with
diffusers."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights
from safetensors.numpy import load_file, save_file
from torch_samples import LINEAR, SOFTMAX, random_null, random_params, random_state, tiny_arch
from torchvision_shim import import_oracle

from lit_jax.checkpoint.load import read_null_caption
from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_arch import check_expected, infer_arch, parse_arch_name
from lit_jax.convert.torch_export import export, export_params, to_torch_state, torch_layout
from lit_jax.convert.torch_files import Source, TensorInfo
from lit_jax.convert.torch_import import convert as convert_file
from lit_jax.convert.torch_import import describe, from_torch_state
from lit_jax.convert.torch_survey import Hints
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

SDXL_VAE = {'space': 'vae', 'vae': 'stabilityai/sdxl-vae', 'scale': 0.13025, 'downscale': 8}
NULL = 'y_embedder.y_embedding'


def pixart_arch(mixer=SOFTMAX, **changes) -> dict:
    """Depth 2, width 16, 8x8 latents, captions of 5 tokens with 12 channels."""
    arch = tiny_arch(mixer, family='pixart', input_size=[8, 8], cross_heads=2, caption_channels=12,
                     caption_tokens=5, base_size=4, pe_interpolation=0.125)
    del arch['num_classes']
    return {**arch, **changes}


# One of every kind: softmax, linear, and compressed keys in the last block.
ARCHS = {'softmax': pixart_arch(), 'linear': pixart_arch({**LINEAR, 'heads': 1}),
         'compressed': pixart_arch(stages=[{'depth': 1}, {'depth': 1, 'mixer': {'compress': 2}}]),
         'unlike heads': pixart_arch(cross_heads=4),
         'grey': pixart_arch(channels=1, learn_sigma=False, patch=1, base_size=8,
                             pe_interpolation=0.25)}
XL = {'depth': 28, 'width': 1152, 'caption_channels': 4096, 'caption_tokens': 300, 'cross_heads': 16}
SIGMA = pixart_arch({**SOFTMAX, 'heads': 16}, **XL)
LIT = pixart_arch({**LINEAR, 'heads': 2, 'dwc_kernel': 5}, **XL)


def shapes_of(arch, layout='original') -> Source:
    """A file of which only names and shapes are there."""
    return Source({key: TensorInfo(shape, 'float32') for key, shape in torch_layout(arch, layout).items()})


def assert_trees_equal(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert np.array_equal(a[path], b[path]), path


# ------------------------------------------------------------------------------------------------------
# Original names


@pytest.mark.parametrize('arch, parameters', [(SIGMA, 610_856_096), (LIT, 611_178_656)],
                         ids=['PixArt-Σ', 'LiT-0.6B'])
@pytest.mark.parametrize('image, pe_interpolation', [(256, 0.5), (512, 1.0), (1024, 2.0), (2048, 4.0)])
def test_published_sizes_are_read_off_their_shapes(arch, parameters, image, pe_interpolation):
    side = image // 8
    expected = arch | {'input_size': [side, side], 'base_size': side // 2,
                       'pe_interpolation': pe_interpolation}
    inferred = infer_arch(shapes_of(arch), 'file', Hints(input_size=(side, side)))
    assert not inferred.problems and inferred.arch == expected
    numbers = {key: int(np.prod(shape)) for key, shape in torch_layout(arch).items()}
    assert sum(numbers.values()) - numbers[NULL] == parameters
    name = {'softmax': 'pixart_xl', 'linear': 'lit_t2i'}[arch['mixer']['name']]
    check_expected(inferred.arch, parse_arch_name(f'{name}_{image}'), 'file', downscale=8)
    with pytest.raises(UserError, match='family: pixart there, dit asked for'):
        check_expected(inferred.arch, parse_arch_name('dit_xl'), 'file')


def test_compressed_layers_become_stages():
    """PixArt-Σ's own setting: one key for 2x2 tokens in layers 14..27."""
    stages = [{'depth': 14}, {'depth': 14, 'mixer': {'compress': 2}}]
    inferred = infer_arch(shapes_of(SIGMA | {'stages': stages}), 'file', Hints(input_size=(128, 128)))
    assert not inferred.problems and inferred.arch['stages'] == stages


@pytest.mark.parametrize('name', ['pixart_square', 'pixart_nonsquare_kv', 'pixart_wide_nomask'])
def test_official_weights_with_nothing_told_but_heads_and_size(goldens, name):
    meta, state, _ = weights.load(goldens / f'{name}.npz')
    config, side = meta['config'], meta['config']['input_size']
    arch, params = from_torch_state(state, heads=config['heads'], input_size=(side, side))
    assert (arch['depth'], arch['width'], arch['patch'], arch['cross_heads']) == tuple(
        config[key] for key in ('depth', 'width', 'patch', 'heads'))
    assert (arch['caption_channels'], arch['caption_tokens']) == (config['cap'], config['L'])
    assert len(arch['stages']) == (2 if config['kv'] else 0) and arch['base_size'] == side // config['patch']
    back = to_torch_state(params, arch, null_caption=state[NULL])
    assert back.keys() == state.keys() - {'pos_embed'} and all(np.array_equal(back[key], state[key])
                                                               for key in back)


@pytest.mark.parametrize('name', ARCHS)
def test_round_trips_are_bitwise(name):
    """jax -> torch -> jax -> torch, null caption included, no position table; the tree is the network's."""
    arch = ARCHS[name]
    params = random_params(arch)
    state = to_torch_state(params, arch, null_caption=random_null(arch))
    assert {key: value.shape for key, value in state.items()} == torch_layout(arch)
    assert NULL in state and 'pos_embed' not in state
    heads = {} if arch['mixer']['name'] == 'linear' else {'heads': 2}
    inferred, back = from_torch_state(state, input_size=(8, 8), cross_heads=arch['cross_heads'], **heads)
    assert inferred == arch
    assert_trees_equal(back, params)
    again = to_torch_state(back, inferred, null_caption=state[NULL])
    assert list(again) == list(state) and all(np.array_equal(again[key], state[key]) for key in state)
    expected = {path: leaf.shape for path, leaf in named_leaves(Network(arch).abstract()).items()}
    assert {path: leaf.shape for path, leaf in named_leaves(back).items()} == expected


def test_values_land_where_the_layout_says():
    state = random_state(pixart_arch())
    _, params = from_torch_state(state, pixart_arch())
    # Head 1, channel 3, from input 5, in block 1; values are the second half of kv.
    assert params['blocks']['cross_attn']['q']['kernel'][1, 5, 1,
                                                         3] == state['blocks.1.cross_attn.q_linear.weight'][
                                                             11, 5]
    assert params['blocks']['cross_attn']['kv']['kernel'][1, 5, 1, 1,
                                                          3] == state['blocks.1.cross_attn.kv_linear.weight'][
                                                              27, 5]
    assert params['blocks']['cross_attn']['kv']['bias'][0, 1, 1,
                                                        3] == state['blocks.0.cross_attn.kv_linear.bias'][27]
    assert params['blocks']['cross_attn']['proj']['kernel'][0, 1, 3,
                                                            5] == state['blocks.0.cross_attn.proj.weight'][
                                                                5, 11]
    # gate_mlp is the last of the six, in the shared modulation and in the tables.
    assert params['t_block']['kernel'][2, 5, 7] == state['t_block.1.weight'][5 * 16 + 7, 2]
    assert params['blocks']['scale_shift_table'][1, 5, 7] == state['blocks.1.scale_shift_table'][5, 7]


def test_a_stored_position_table_is_ignored():
    """As the official loader does: it may be of another resolution."""
    state = random_state(pixart_arch()) | {'pos_embed': np.full((1, 7, 16), 3, np.float32)}
    arch, _ = from_torch_state(state, heads=2, input_size=(8, 8))
    assert arch == pixart_arch()


def test_all_problems_are_told_at_once():
    state = random_state(pixart_arch({**LINEAR, 'heads': 1}))
    del state['blocks.0.cross_attn.proj.bias'], state['blocks.1.cross_attn.proj.bias'], state[
        't_block.1.weight']
    state['blocks.1.scale_shift_table'] = state['blocks.1.scale_shift_table'][:5]
    state['y_embedder.y_proj.fc2.bias'][0] = np.nan
    state['y_embedder.embedding_table.weight'] = np.ones((3, 16), np.float32)
    with pytest.raises(UserError) as error:
        from_torch_state(state)
    text = str(error.value)
    for line in ('missing tensor: blocks.{0-1}.cross_attn.proj.bias', 'missing tensor: t_block.1.weight',
                 'misshaped tensor: blocks.1.scale_shift_table has (5, 16), expected (6, 16)',
                 'non-finite values in tensor: y_embedder.y_proj.fc2.bias',
                 'unexpected tensor: y_embedder.embedding_table.weight',
                 'give --image_size N: 256, 512, 1024 or 2048',
                 'the file does not show the heads of the cross-attention'):
        assert line in text
    assert text.count('tensor:') == 5
    with pytest.raises(UserError, match='3 heads of the cross-attention do not divide the width 16'):
        from_torch_state(random_state(pixart_arch(LINEAR)), input_size=(8, 8), cross_heads=3)


def test_caption_features_of_unlike_widths():
    state = random_state(pixart_arch())
    state[NULL] = state[NULL][:, :8]
    with pytest.raises(UserError,
                       match=r'misshaped tensor: y_embedder.y_embedding has \(5, 8\), expected \(5, 12\)'):
        from_torch_state(state, heads=2, input_size=(8, 8))


# ------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.peers
@pytest.mark.parametrize('kind', ['published', 'training'])
def test_pth_files(convert, tmp_path, capsys, kind):
    """PixArt's .pth: the weights under `state_dict`, of training also under `state_dict_ema`; size by the
    file's name."""
    import torch
    states = [random_state(pixart_arch(), seed) for seed in range(2)]
    tensors = [{key: torch.from_numpy(value) for key, value in state.items()} for state in states]
    content = {'state_dict': tensors[0]} | ({'state_dict_ema': tensors[1], 'step': 5} if kind == 'training'
                                            else {})
    path = tmp_path / 'PixArt-Sigma-XL-2-1024-MS.pth'
    torch.save(content, path)
    convert(path, '--heads', 2, '--out', tmp_path / 'named')
    assert 'note     1024x1024 pixels, by the name of the file' in (printed := capsys.readouterr().out)
    assert 'captions of 5 tokens x 12, 2 cross-attention heads; positions 0..32' in printed \
        and 'it draws with the text encoder of its training' in printed
    config, params = load_model_folder(tmp_path / 'named')
    assert config['model'] == pixart_arch(input_size=[128, 128], base_size=64, pe_interpolation=2.0)
    assert {**config['text'], 'null_caption': ''} == {'encoder': None, 'channels': 12, 'tokens': 5,
                                                      'null_caption': ''}
    assert config['classes'] is None and config['latent'] == SDXL_VAE
    assert np.array_equal(read_null_caption(tmp_path / 'named'), states[kind == 'training'][NULL])
    assert len(config['text']['null_caption']) == 64 and config['format'] == 2
    assert config['provenance']['weights'] == ('ema' if kind == 'training' else 'state_dict')
    convert(path, '--heads', 2, '--weights', 'model', '--image_size', 512, '--out', tmp_path / 'told')
    config, params = load_model_folder(tmp_path / 'told')
    assert config['model'] == pixart_arch(input_size=[64, 64], base_size=32, pe_interpolation=1.0)
    assert np.array_equal(read_null_caption(tmp_path / 'told'), states[0][NULL])
    assert 'by the name' not in capsys.readouterr().out


@pytest.mark.parametrize('name, side',
                         [('PixArt-Sigma-XL-2-256x256.pth', 32), ('PixArt-Sigma-XL-2-512-MS.pth', 64),
                          ('PixArt-Sigma-XL-2-2K-MS.pth', 256), ('pixart_1024.safetensors', 128)])
def test_resolutions_by_file_name(tmp_path, name, side):
    source = shapes_of(SIGMA)
    source.files = (tmp_path / name,)
    assert infer_arch(source, name, Hints()).arch['input_size'] == [side, side]


def test_no_resolution_anywhere(convert, tmp_path):
    save_file(random_state(pixart_arch()), tmp_path / 'model-10240.safetensors')
    with pytest.raises(UserError, match='nothing in the file shows the resolution'):
        convert(tmp_path / 'model-10240.safetensors', '--heads', 2, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_file_without_null_caption_says_so(convert, tmp_path, capsys):
    state = random_state(pixart_arch())
    del state[NULL]
    save_file(state, tmp_path / 'x.safetensors')
    convert(tmp_path / 'x.safetensors', '--heads', 2, '--image_size', 64, '--out', tmp_path / 'out')
    assert 'the file has no null caption' in capsys.readouterr().out
    config, params = load_model_folder(tmp_path / 'out')
    assert config['text'] == {'encoder': None, 'channels': 12, 'tokens': 300, 'null_caption': 'absent'}
    assert read_null_caption(tmp_path / 'out') is None and 'null_caption' not in params['y_embedder']
    export(tmp_path / 'out', tmp_path / 'back.safetensors')
    assert NULL not in load_file(tmp_path / 'back.safetensors')


def test_our_own_files_carry_everything_back(tmp_path):
    """Folder -> .safetensors -> folder: heads, text encoder and the latent travel as metadata; nothing has to
    be told."""
    arch = pixart_arch({**LINEAR, 'heads': 1, 'activation': 'gelu'}, cross_heads=4, pe_interpolation=0.3)
    config = {'format': 1, 'model': arch, 'diffusion': {'steps': 1000, 'kind': 'linear'},
              'latent': {**SDXL_VAE, 'scale': 0.5}, 'classes': None,
              'text': {'encoder': 'mine/t5', 'channels': 12, 'tokens': 5}, 'provenance': {'weights': 'ema'}}
    params = random_params(arch)
    null = random_null(arch)
    export_params(tmp_path / 'lit.safetensors', config, params, null)
    convert_file(tmp_path / 'lit.safetensors', tmp_path / 'lit')
    again, loaded = load_model_folder(tmp_path / 'lit')
    assert again['text'].pop('null_caption') != 'absent'
    assert {key: again[key] for key in ('model', 'diffusion', 'latent', 'classes', 'text')} == {
        key: config[key] for key in ('model', 'diffusion', 'latent', 'classes', 'text')}
    assert_trees_equal(loaded, params)
    assert np.array_equal(read_null_caption(tmp_path / 'lit'), null)
    export(tmp_path / 'lit', tmp_path / 'again.safetensors')
    before, after = (load_file(tmp_path / f'{name}.safetensors') for name in ('lit', 'again'))
    assert list(before) == list(after) and all(np.array_equal(before[key], after[key]) for key in before)
    assert not list(tmp_path.glob('.*'))


def test_another_caption_width_than_the_text_section(tmp_path):
    config = {'model': pixart_arch(), 'text': {'encoder': None, 'channels': 2048, 'tokens': 5}}
    export_params(tmp_path / 'x.safetensors', config, random_params(pixart_arch()))
    with pytest.raises(UserError,
                       match='"text.channels" is 2048, the caption projection of the model has 12'):
        convert_file(tmp_path / 'x.safetensors', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# ------------------------------------------------------------------------------------------------------
# diffusers


def hub_model(**changes):
    """A random PixArtTransformer2DModel whose outputs are of order one."""
    import torch
    diffusers = import_oracle('diffusers')
    torch.manual_seed(0)
    options = {'num_attention_heads': 2, 'attention_head_dim': 8, 'in_channels': 4, 'out_channels': 8,
               'num_layers': 2, 'cross_attention_dim': 16, 'sample_size': 8, 'caption_channels': 12,
               'use_additional_conditions': False}
    return diffusers.PixArtTransformer2DModel(**{**options, **changes}).eval()


def random_inputs(arch, size, tokens) -> dict:
    """Noise, two timesteps, captions of several lengths, none of them full."""
    rng = np.random.default_rng(1)
    return {'x': rng.standard_normal((2, *size, arch['channels'])).astype(np.float32),
            't': np.array([3, 871], np.int32),
            'text': rng.standard_normal((2, tokens, arch['caption_channels'])).astype(np.float32),
            'text_mask': (np.arange(tokens) < np.array([[tokens // 2], [1]])).astype(np.int32)}


def hub_output(model, x, t, text, text_mask) -> np.ndarray:
    """What diffusers' model gives, in our layout."""
    import torch
    x, t, text, mask = (torch.from_numpy(value)
                        for value in (x.transpose(0, 3, 1, 2).copy(), t, text, text_mask))
    with torch.no_grad():
        return model(x, text, t, encoder_attention_mask=mask).sample.numpy().transpose(0, 2, 3, 1)


def there_and_back(tmp_path, sizes, tokens, **changes) -> dict:
    """diffusers -> model folder -> diffusers: outputs at most 2e-5 of the largest apart, the same tensors.
    Returns the config."""
    model = hub_model(**changes)
    model.save_pretrained(tmp_path / 'pipeline' / 'transformer')
    convert_file(tmp_path / 'pipeline', tmp_path / 'ours')
    config, params = load_model_folder(tmp_path / 'ours')
    export(tmp_path / 'ours', tmp_path / 'back', layout='diffusers')
    again, network = type(model).from_pretrained(tmp_path / 'back').eval(), Network(config['model'])
    params = jax.tree.map(jnp.asarray, params)
    for size in sizes:
        inputs = random_inputs(config['model'], size, tokens)
        got = jax.jit(network.apply)(params, inputs['x'], inputs['t'],
                                     {name: inputs[name] for name in ('text', 'text_mask')})
        for theirs in (model, again):
            want = hub_output(theirs, **inputs)
            assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max(), size
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(np.array_equal(value.numpy(), state[key].numpy()) for key, value in model.state_dict().items())
    for name in ('sample_size', 'num_attention_heads', 'attention_head_dim', 'caption_channels',
                 'out_channels', 'num_layers'):
        assert again.config[name] == model.config[name]
    return config


@pytest.mark.peers
@pytest.mark.parametrize('scale', [None, 0.5])
def test_outputs_equal_diffusers(tmp_path, scale):
    config = there_and_back(tmp_path, [(8, 8), (4, 12)], 7, interpolation_scale=scale)
    assert config['model'] == pixart_arch(caption_tokens=300, pe_interpolation=scale or 1)
    assert config['text']['null_caption'] == 'absent' and config['latent'] == SDXL_VAE


@pytest.mark.peers
@pytest.mark.slow
def test_outputs_equal_diffusers_at_full_width(tmp_path):
    config = there_and_back(tmp_path, [(32, 32), (24, 40)], 300, num_attention_heads=16,
                            attention_head_dim=72, sample_size=32, cross_attention_dim=1152,
                            caption_channels=4096, interpolation_scale=0.5)
    assert config['model']['cross_heads'] == config['model']['mixer']['heads'] == 16


def hub_folder(path, arch, **changes):
    """A diffusers folder as other writers make it: no metadata of ours, any config."""
    config = {'_class_name': 'Transformer2DModel', 'num_attention_heads': 2, 'attention_head_dim': 8,
              'in_channels': 4,
              'num_layers': 2, 'patch_size': 2, 'sample_size': 8, 'caption_channels': 12,
              'cross_attention_dim': 16, 'norm_type': 'ada_norm_single', 'num_embeds_ada_norm': 1000,
              'interpolation_scale': 1, **changes}
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(config))
    save_file(to_torch_state(random_params(arch), arch, 'diffusers'),
              path / 'diffusion_pytorch_model.safetensors')
    return path


@pytest.mark.parametrize('changes, message', [
    ({'use_additional_conditions': True}, 'asks for micro conditions'),
    ({'sample_size': 128}, r'micro conditions \(use_additional_conditions, the default at sample_size 128'),
    ({'norm_eps': 1e-5}, 'config.json says norm_eps 1e-05, this converter reads models with 1e-06'),
    ({'caption_channels': 4096}, 'config.json says caption_channels 4096, the tensors say 12'),
    ({'out_channels': 4}, 'config.json says out_channels 4, the tensors say 8'),
    ({'cross_attention_dim': 768}, 'config.json says cross_attention_dim 768, the tensors say 16'),
    ({'interpolation_scale': 0}, 'interpolation_scale must be a number above 0, at most 10000000, got 0'),
    ({'caption_channels': 'many'}, "caption_channels is 'many', expected an integer"),
    ({'_class_name': 'SanaTransformer2DModel'}, 'is the config of a SanaTransformer2DModel; this converter '
                                                'reads DiT'),
])
def test_hub_folders_that_do_not_fit(tmp_path, changes, message):
    folder = hub_folder(tmp_path / 'hub', pixart_arch(), **changes)
    with pytest.raises(UserError, match=message):
        convert_file(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_old_hub_folders_and_their_size(tmp_path):
    """Folders of older diffusers call the class otherwise; another size than theirs cannot be asked for."""
    folder = hub_folder(tmp_path / 'hub', pixart_arch())
    done = convert_file(folder, tmp_path / 'out')
    assert done.arch == pixart_arch(caption_tokens=300,
                                    pe_interpolation=1) and 'note     the file has no null' in describe(done)
    with pytest.raises(UserError, match=r'trained for 64x64 pixels \(latent 8x8\), asked for 128x128 pixels'):
        convert_file(folder, tmp_path / 'other', expected={'image_size': 128})


@pytest.mark.parametrize('arch', [
    pixart_arch(LINEAR), tiny_arch(), ARCHS['compressed'], ARCHS['unlike heads'],
    pixart_arch({**SOFTMAX, 'qkv_bias': False})])
def test_what_diffusers_has_no_class_for_becomes_a_pipeline(tmp_path, arch):
    config = {'model': arch, 'diffusion': {'steps': 1000, 'kind': 'linear'}, 'latent': SDXL_VAE,
              'classes': None, 'provenance': {}}
    export_params(tmp_path / 'x.safetensors', config | {'format': 1}, random_params(arch))
    convert_file(tmp_path / 'x.safetensors', tmp_path / 'model')
    with pytest.raises(UserError, match='the pipeline needs the VAE of the model .*none is given'):
        export(tmp_path / 'model', tmp_path / 'hub', layout='diffusers')
    assert not (tmp_path / 'hub').exists()


def test_the_hub_folder_that_the_script_writes(convert, tmp_path, capsys):
    """Our own folders come back whole but for the null caption; only such a folder is overwritten."""
    state = random_state(pixart_arch())
    save_file(state, tmp_path / 'x.safetensors')
    convert(tmp_path / 'x.safetensors', '--heads', 2, '--image_size', 64, '--out', tmp_path / 'model')
    out = ('--to_torch', '--layout', 'diffusers', '--out', tmp_path / 'hub')
    convert(tmp_path / 'model', *out)
    assert 'diffusers keeps no null caption' in capsys.readouterr().out
    convert(tmp_path / 'hub', '--out', tmp_path / 'again')
    config, params = load_model_folder(tmp_path / 'again')
    assert config['model'] == pixart_arch() and config['text']['null_caption'] == 'absent'
    back = to_torch_state(params, config['model'])
    assert all(np.array_equal(back[key], state[key]) for key in state if key != NULL) and NULL not in back
    with pytest.raises(UserError, match='exists already'):
        convert(tmp_path / 'model', *out)
    with pytest.raises(SystemExit):
        convert(tmp_path / 'x.safetensors', '--layout', 'diffusers', '--out', tmp_path / 'y')
    convert(tmp_path / 'model', *out, '--overwrite')
    (tmp_path / 'hub' / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='was not written by --layout diffusers'):
        convert(tmp_path / 'model', *out, '--overwrite')
    assert sorted(path.name for path in (tmp_path / 'hub').iterdir()) == [
        'config.json', 'diffusion_pytorch_model.safetensors', 'notes.txt']
