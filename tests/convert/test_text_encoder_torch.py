"""transformers' T5 folders: every tensor in its place, in each kind of file, the way back, and each mistake
named."""
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from text_encoder_samples import ARCH, HUB, TEXT, random_state, same_trees, tokenizer_json, write_hub_folder
from torchvision_shim import import_oracle

from lit_jax.checkpoint.text_encoder_folder import load_text_encoder
from lit_jax.convert.text_encoder_torch import (
    arch_of,
    convert_text_encoder,
    export_text_encoder,
    is_hub_text_encoder,
)
from lit_jax.models.t5 import T5_XXL
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import file_sha256
from lit_jax.text.encoder import encode_captions

QKV = 'encoder.block.1.layer.0.SelfAttention.{}.weight'


def write_shards(folder, state, file='model', suffix='.safetensors', save=save_file):
    """Two files and their index, as transformers writes large models."""
    keys = sorted(state)
    parts = {f'{file}-0000{i + 1}-of-00002{suffix}': keys[i::2] for i in range(2)}
    for name, own in parts.items():
        save({key: state[key] for key in own}, folder / name)
    index = {'metadata': {}, 'weight_map': {key: name for name, own in parts.items() for key in own}}
    (folder / f'{file}{suffix}.index.json').write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------------------------
# Names and values


def test_the_script_recognises_a_text_encoder(convert, tmp_path, capsys):
    state = random_state()
    hub = write_hub_folder(tmp_path / 'PixArt-Tiny' / 'text_encoder', state, tokenizer=None)
    (tmp_path / 'PixArt-Tiny' / 'tokenizer').mkdir()
    (tmp_path / 'PixArt-Tiny' / 'tokenizer' / 'tokenizer.json').write_bytes(tokenizer_json())
    assert is_hub_text_encoder(hub)
    assert convert(hub, '--out', tmp_path / 't5', '--text_dtype', 'float32') == 0
    printed = capsys.readouterr().out
    for words in ('id       PixArt-Tiny', '2 layers, width 16, 2 heads of 6',
                  '5,984 parameters, 23.9 kB as float32', 'tokenizer.json'):
        assert words in printed
    encoder = load_text_encoder(tmp_path / 't5', 'float32')
    assert (encoder.network.arch, encoder.sha256) == (ARCH, file_sha256(hub / 'model.safetensors'))
    qkv = np.asarray(encoder.params['blocks']['attn']['qkv']['kernel'])
    assert qkv.shape == (2, 16, 3, 2, 6)
    for i, part in enumerate('qkv'):
        assert np.array_equal(qkv[1, :, i].reshape(16, 12), state[QKV.format(part)].T)
    assert np.array_equal(encoder.params['embed']['table'], state['shared.weight'])
    assert convert(tmp_path / 't5', '--to_torch', '--out', tmp_path / 'back') == 0
    assert {key: value.tolist()
            for key, value in load_file(tmp_path / 'back' / 'model.safetensors').items()} == {
key: value.tolist() for key, value in state.items()}
    with pytest.raises(UserError, match='--arch is for diffusion models'):
        convert(hub, '--out', tmp_path / 'other', '--arch', 'dit_xl')


def assert_same_parameters(tmp_path, *names) -> list:
    """Converts the folders of these names; returns what is loaded."""
    found = []
    for name in names:
        convert_text_encoder(tmp_path / name, tmp_path / f'{name}_out', text_dtype='float32')
        found.append(load_text_encoder(tmp_path / f'{name}_out', 'float32'))
    assert all(same_trees(encoder.params, found[0].params) for encoder in found)
    return found


def test_every_kind_of_file_gives_the_same_parameters(tmp_path):
    state = random_state()
    write_hub_folder(tmp_path / 'whole', state, tokenizer='spiece.model')
    write_shards(write_hub_folder(tmp_path / 'shards', file=None), state)
    decoder = {'decoder.block.0.layer.0.SelfAttention.q.weight': np.zeros((2, 2), np.float32),
               'lm_head.weight': np.zeros((3, 2), np.float32),
               'encoder.embed_tokens.weight': state['shared.weight']}
    write_hub_folder(tmp_path / 'both', {**state, **decoder},
                     {**HUB, 'architectures': ['T5ForConditionalGeneration']})
    renamed = {'encoder.embed_tokens.weight' if key == 'shared.weight' else key: value
               for key, value in state.items()}
    write_hub_folder(tmp_path / 'renamed', renamed)
    whole, shards, *_ = assert_same_parameters(tmp_path, 'whole', 'shards', 'both', 'renamed')
    assert whole.tokenizer.file == 'spiece.model' and shards.tokenizer.file == 'tokenizer.json'


@pytest.mark.peers
def test_bin_files_give_the_same_parameters(tmp_path):
    import torch
    state = random_state()

    def save(tensors, path):
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)

    write_hub_folder(tmp_path / 'whole', state)
    save(state, write_hub_folder(tmp_path / 'bin', file=None) / 'pytorch_model.bin')
    write_shards(write_hub_folder(tmp_path / 'bin_shards', file=None), state, 'pytorch_model', '.bin', save)
    assert_same_parameters(tmp_path, 'whole', 'bin', 'bin_shards')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_there_and_back_is_bitwise(tmp_path, dtype):
    """Files of either dtype; a folder in the file's dtype gives the same file's values, and the same folder
    again."""
    state = {key: value.astype(dtype) for key, value in random_state().items()}
    convert_text_encoder(write_hub_folder(tmp_path / 'hub', state), tmp_path / 'one', text_dtype=dtype)
    export_text_encoder(tmp_path / 'one', tmp_path / 'back')
    back = load_file(tmp_path / 'back' / 'model.safetensors')
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key].astype(np.float32), state[key].astype(np.float32)) for key in state)
    assert all(back[key].dtype == (np.float32 if 'norm' in key or 'bias' in key else state[key].dtype)
               for key in state)
    convert_text_encoder(tmp_path / 'back', tmp_path / 'two', text_dtype=dtype)
    assert same_trees(load_text_encoder(tmp_path / 'one').params, load_text_encoder(tmp_path / 'two').params)
    # not the name of the folder
    assert load_text_encoder(tmp_path / 'two').id == load_text_encoder(tmp_path / 'one').id


def test_bfloat16_is_the_default_and_int8_is_as_when_loading(tmp_path):
    hub = write_hub_folder(tmp_path / 'hub')
    convert_text_encoder(hub, tmp_path / 'plain')
    kernel = load_text_encoder(tmp_path / 'plain').params['blocks']['mlp']['down']['kernel']
    assert kernel.dtype == ml_dtypes.bfloat16
    convert_text_encoder(hub, tmp_path / 'int8', text_dtype='int8')
    convert_text_encoder(hub, tmp_path / 'float32', text_dtype='float32')
    assert same_trees(load_text_encoder(tmp_path / 'int8').params,
                      load_text_encoder(tmp_path / 'float32', 'int8').params)
    with pytest.raises(UserError, match='int8 weights, rounded for good'):
        export_text_encoder(tmp_path / 'int8', tmp_path / 'back')


@pytest.mark.peers
def test_features_and_files_of_transformers(tmp_path):
    """A model that transformers saved, through our folder, and our export read by transformers: the same
    features."""
    transformers = import_oracle('transformers')
    import torch
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(
        transformers.T5Config(**{k: v for k, v in HUB.items() if k != 'architectures'})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.5)
    model.save_pretrained(tmp_path / 'hub')
    (tmp_path / 'hub' / 'tokenizer.json').write_bytes(tokenizer_json())
    convert_text_encoder(tmp_path / 'hub', tmp_path / 't5', text_dtype='float32')
    encoder = load_text_encoder(tmp_path / 't5', 'float32')
    features = encode_captions(encoder, [TEXT[0], '', 'two blue'], 40)
    ids, mask = (torch.tensor(part)
                 for part in (encoder.tokenizer.encode([TEXT[0], '', 'two blue'], 40).ids, features.mask))
    export_text_encoder(tmp_path / 't5', tmp_path / 'back')
    for theirs in (model, transformers.T5EncoderModel.from_pretrained(tmp_path / 'back').eval()):
        with torch.no_grad():
            want = theirs(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
        assert np.abs(features.text - want).max() <= 2e-5 * np.abs(want).max()


# ------------------------------------------------------------------------------------------------------
# config.json


def test_published_configurations():
    """The fields of t5-v1_1-xxl's and flan-t5-xxl's config.json, and of an mT5's that leaves defaults out."""
    xxl = {'model_type': 't5', 'd_model': 4096, 'd_ff': 10240, 'd_kv': 64, 'num_heads': 64, 'num_layers': 24,
           'num_decoder_layers': 24, 'relative_attention_num_buckets': 32, 'feed_forward_proj': 'gated-gelu',
           'layer_norm_epsilon': 1e-06, 'vocab_size': 32128}
    assert arch_of(xxl, 'here') == T5_XXL
    flan = {**xxl, 'dense_act_fn': 'gelu_new', 'is_gated_act': True, 'relative_attention_max_distance': 128}
    assert arch_of(flan, 'here') == T5_XXL
    mt5 = {'model_type': 'mt5', 'd_model': 512, 'd_ff': 1024, 'num_heads': 6, 'num_layers': 8,
           'vocab_size': 250112}
    assert arch_of(mt5, 'here')['head_dim'] == 64


@pytest.mark.parametrize('change, words', [
    ({'feed_forward_proj': 'relu'}, "feed_forward_proj is 'relu'.*the first T5"),
    ({'feed_forward_proj': 'gated-silu'}, 'gated-silu'),
    ({'dense_act_fn': 'relu'}, "dense_act_fn 'relu'"), ({'model_type': 'umt5'}, "type 'umt5'"),
    ({'model_type': 'clip_text_model'}, 'T5 v1.1, Flan-T5 and mT5'),
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon is 1e-05'),
    ({'num_layers': 0}, 'text_encoder.layers is num_layers')])
def test_other_networks_are_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        arch_of({**HUB, **change}, 'here')


# ------------------------------------------------------------------------------------------------------
# Bad files


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    state = random_state()
    del state[QKV.format('k')]
    state[QKV.format('v')] = state[QKV.format('v')].T
    state['encoder.block.2.layer.0.layer_norm.weight'] = np.ones(16, np.float32)
    state['encoder.final_layer_norm.weight'] = np.ones(16, np.int32)
    hub = write_hub_folder(tmp_path / 'hub',
                           {key: np.ascontiguousarray(value) for key, value in state.items()})
    with pytest.raises(UserError) as caught:
        convert_text_encoder(hub, tmp_path / 'out')
    for words in (f'missing tensor: {QKV.format("k")} [12, 16]',
                  f'misshaped tensor: {QKV.format("v")} has [16, 12], expected [12, 16]',
                  'unexpected tensor: encoder.block.2.layer.0.layer_norm.weight',
                  'wrong dtype in tensor: encoder.final_layer_norm'):
        assert words in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_wrong_values_are_told(tmp_path):
    state = random_state()
    state[QKV.format('q')][3, 2] = np.nan
    state['encoder.embed_tokens.weight'] = state['shared.weight'] + 1
    with pytest.raises(UserError) as caught:
        convert_text_encoder(write_hub_folder(tmp_path / 'hub', state), tmp_path / 'out')
    assert f'non-finite values in tensor: {QKV.format("q")}' in str(
        caught.value) and 'differ; they are one table' in str(caught.value)


def test_missing_files_are_told(tmp_path):
    with pytest.raises(UserError, match='there is no tokenizer in .*expected tokenizer.json or spiece.model'):
        convert_text_encoder(write_hub_folder(tmp_path / 'a', tokenizer=None), tmp_path / 'out')
    with pytest.raises(UserError, match='holds no weights: expected model.safetensors'):
        convert_text_encoder(write_hub_folder(tmp_path / 'b', file=None), tmp_path / 'out')
    shards = write_shards(write_hub_folder(tmp_path / 'c', file=None), random_state())
    (shards / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match='lacks files that its index names: .*model-00002-of-00002'):
        convert_text_encoder(shards, tmp_path / 'out')
    with pytest.raises(UserError, match='does not exist; give the whole folder of the text encoder'):
        convert_text_encoder(tmp_path / 'nothing', tmp_path / 'out')
    with pytest.raises(UserError, match='the tokenizer has .* tokens, the embedding'):
        convert_text_encoder(write_hub_folder(tmp_path / 'd', config={**HUB, 'vocab_size': 20}),
                             tmp_path / 'out')
    with pytest.raises(UserError, match='unknown text_dtype'):
        convert_text_encoder(tmp_path / 'a', tmp_path / 'out', text_dtype='int4')
    assert not (tmp_path / 'out').exists()
