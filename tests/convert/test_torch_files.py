"""Readers of .pt, .safetensors and diffusers folders: what they find, and what they refuse."""
import argparse
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch_files_by_hand as by_hand
from safetensors.numpy import save_file
from torch_samples import hub_config, random_state, tiny_arch, to_diffusers

from lit_jax.convert import torch_files
from lit_jax.convert.torch_files import open_source
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import file_sha256


@pytest.fixture
def torch():
    import torch
    return torch


def as_tensors(torch, state):
    return {key: torch.from_numpy(value) for key, value in state.items()}


class RunsCode:
    """Unpickling this creates a file named `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def assert_holds(source, state):
    assert set(source.tensors) == set(state)
    for key, value in state.items():
        assert source.tensors[key].shape == value.shape
        assert np.array_equal(source.read(key), value)
    source.release()
    assert np.array_equal(source.read(key), value)       # maps the file again
    assert source.read(key).dtype == np.float32


# ------------------------------------------------------------------------------------------------------
# .pt


@pytest.mark.peers
def test_bare_state_dict(torch, tmp_path):
    state = random_state(tiny_arch())
    torch.save(as_tensors(torch, state), tmp_path / 'model.pt')
    source = open_source(tmp_path / 'model.pt')
    assert_holds(source, state)
    assert source.weights == 'state_dict' and source.files == (tmp_path / 'model.pt',) and not source.problems


@pytest.mark.peers
def test_training_checkpoint_gives_the_weights_asked_for(torch, tmp_path):
    """{model, ema, opt, args} as DiT's train.py writes it; the model's keys prefixed as by
    DistributedDataParallel."""
    model, ema = random_state(tiny_arch(), 1), random_state(tiny_arch(), 2)
    torch.save({'model': {f'module.{key}': value for key, value in as_tensors(torch, model).items()},
                'ema': as_tensors(torch, ema),
                'opt': {'state': {0: {'step': torch.tensor(3.)}}, 'param_groups': []},
                'args': argparse.Namespace(model='DiT-XL/2', image_size=256, results_dir='results')},
               tmp_path / 'c.pt')
    assert_holds(open_source(tmp_path / 'c.pt'), ema)
    assert_holds(open_source(tmp_path / 'c.pt', 'model'), model)
    assert open_source(tmp_path / 'c.pt', 'model').weights == 'model'
    torch.save({'model': as_tensors(torch, model)}, tmp_path / 'c.pt')
    with pytest.raises(UserError, match="without 'ema' weights; it has model: use --weights=model"):
        open_source(tmp_path / 'c.pt')
    with pytest.raises(UserError, match='unknown weights'):
        open_source(tmp_path / 'c.pt', 'best')


@pytest.mark.peers
@pytest.mark.parametrize('name', ['float16', 'bfloat16'])
def test_half_precision_is_read_as_float32(torch, tmp_path, name):
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    torch.save({'w': value, 't': value.T}, tmp_path / 'half.pt')
    source = open_source(tmp_path / 'half.pt')
    assert source.tensors['w'].dtype == name
    assert np.array_equal(source.read('w'), value.float().numpy())
    assert np.array_equal(source.read('t'), value.float().numpy().T)      # a strided view of the same storage


@pytest.mark.peers
@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'ema': {'w': x}}, lambda x: {'ema': {}, 'args': x}])
def test_pickle_that_runs_code_is_refused_and_not_run(torch, tmp_path, wrap):
    """Zip files of torch.save; the code would make a folder."""
    torch.save(wrap(RunsCode(tmp_path / 'marker')), tmp_path / 'evil.pt')
    with pytest.raises(UserError, match='is refused: it asks for posix.mkdir.*Nothing of it was run'):
        open_source(tmp_path / 'evil.pt')
    assert not (tmp_path / 'marker').exists()
    torch.load(tmp_path / 'evil.pt', weights_only=False)                 # the file is a live one
    assert (tmp_path / 'marker').exists()


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_plain_pickle_is_refused_and_not_run(tmp_path, protocol):
    """In the text and the binary form."""
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps({'w': RunsCode(tmp_path / 'marker')}, protocol))
    with pytest.raises(UserError, match='is a plain pickle, not a file of torch.save'):
        open_source(tmp_path / 'evil.pt')
    assert not (tmp_path / 'marker').exists()


@pytest.mark.peers
def test_legacy_torch_file_is_refused_and_not_run(torch, tmp_path):
    torch.save({'w': RunsCode(tmp_path / 'marker')}, tmp_path / 'old.pt',
               _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match='is refused: it asks for posix.mkdir'):
        open_source(tmp_path / 'old.pt')
    assert not (tmp_path / 'marker').exists()


@pytest.mark.peers
@pytest.mark.parametrize('fraction', [0.001, 0.3, 0.999])
def test_truncated_pt(torch, tmp_path, fraction):
    torch.save(as_tensors(torch, random_state(tiny_arch())), tmp_path / 'model.pt')
    whole = (tmp_path / 'model.pt').read_bytes()
    (tmp_path / 'model.pt').write_bytes(whole[:int(fraction * len(whole))])
    with pytest.raises(UserError, match='truncated or damaged.*get it again'):
        open_source(tmp_path / 'model.pt')


@pytest.mark.peers
@pytest.mark.parametrize('content, message', [
    ([1, 2], 'holds a list, expected a state dict'),
    ({'epoch': 3}, r'holds no weights \(found: epoch\)'),
    ({}, r'holds no weights \(found: nothing\)'),
])
def test_pt_without_weights(torch, tmp_path, content, message):
    torch.save(content, tmp_path / 'model.pt')
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / 'model.pt')


@pytest.mark.peers
def test_entries_that_are_no_tensors_are_problems(torch, tmp_path):
    torch.save({'w': torch.ones(2), 'epoch': 3, 'sparse': torch.eye(2).to_sparse()}, tmp_path / 'model.pt')
    source = open_source(tmp_path / 'model.pt')
    assert source.problems == ['not a tensor: epoch (int)']
    # no float dtype: the import will refuse it
    assert 'sparse' in source.tensors['sparse'].dtype


@pytest.mark.peers
def test_zip_that_is_no_torch_file(torch, tmp_path):
    with zipfile.ZipFile(tmp_path / 'model.pt', 'w') as file:
        file.writestr('readme.txt', 'hello')
    with pytest.raises(UserError, match='is a zip file, but none of torch.save'):
        open_source(tmp_path / 'model.pt')


def test_pt_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)        # as if it were not installed
    state = random_state(tiny_arch())
    by_hand.save(tmp_path / 'model.pt', state)
    assert_holds(open_source(tmp_path / 'model.pt'), state)


@pytest.mark.peers
@pytest.mark.parametrize('as_zip', [True, False])
def test_files_of_torch_are_read_without_it(torch, tmp_path, monkeypatch, as_zip):
    state = random_state(tiny_arch(depth=1))
    torch.save(as_tensors(torch, state), tmp_path / 'model.pt', _use_new_zipfile_serialization=as_zip)
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)        # as if it were not installed
    source = open_source(tmp_path / 'model.pt')
    assert {*source.tensors} == {*state}
    for name, array in state.items():
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.peers
def test_files_by_hand_are_what_torch_reads(torch, tmp_path):
    state = random_state(tiny_arch())
    by_hand.save(tmp_path / 'model.pt', state, lambda content: by_hand.dict_of(
        {'ema': content, 'args': by_hand.namespace(lr=3)}))
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / 'model.pt', weights_only=True)
    assert content['args'].lr == 3 and all(np.array_equal(content['ema'][key], state[key]) for key in state)


@pytest.mark.peers
def test_damaged_pickles_are_user_errors(torch, tmp_path):
    """Random bytes in the pickle of a whole zip file (seed 0): a UserError, or tensors, but nothing else."""
    torch.save(as_tensors(torch, random_state(tiny_arch(depth=1))), tmp_path / 'good.pt')
    with zipfile.ZipFile(tmp_path / 'good.pt') as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name, rng, refused = next(name for name in parts
                              if name.endswith('data.pkl')), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(parts[name])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        with zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as file:
            for part, content in parts.items():
                file.writestr(part, bytes(damaged) if part == name else content)
        try:
            open_source(tmp_path / 'bad.pt')
        except UserError:
            refused += 1
    assert refused > 50


# ------------------------------------------------------------------------------------------------------
# .pt that nobody should write


def read_all(path):
    source = open_source(path)
    return {key: source.read(key) for key in source.tensors}


@pytest.mark.parametrize('offset, shape, stride, count', [
    (0, (2 ** 30, 2), (0, 0), 1), (0, (4,), (0,), 2), (0, (2, 3), (3, 1), 5), (4, (2,), (1,), 5),
    (0, (2,), (-1,), 5), (-1, (2,), (1,), 5), (0, (2, 2), (1,), 5), (0, (2 ** 31 - 1,) * 20, (1,) * 20, 5)])
def test_tensors_larger_than_their_storage(tmp_path, offset, shape, stride, count):
    tensor = by_hand.tensor('0', shape, stride, count=count, offset=offset)
    by_hand.write_zip(tmp_path / 'x.pt', by_hand.dict_of({'w': tensor}), {'0': bytes(4 * count)})
    with pytest.raises(UserError, match=r'x\.pt is truncated or damaged \(w: .*(tensor|whole)'):
        read_all(tmp_path / 'x.pt')


def test_tensors_may_share_and_overlap_within_their_storage(tmp_path):
    values = np.array([0, 1, 2, 3, 4, 9], np.float32)
    tensors = {'rows': by_hand.tensor('0', (3, 2), (1, 1)), 'turned': by_hand.tensor('0', (2, 2), (1, 2)),
               'none': by_hand.tensor('0', (0, 7)), 'one': by_hand.tensor('0', (), offset=3)}
    by_hand.write_zip(tmp_path / 'x.pt', by_hand.dict_of(tensors), {'0': values.tobytes()})
    found = read_all(tmp_path / 'x.pt')
    assert found['rows'].tolist() == [[0, 1], [1, 2], [2, 3]] and found['turned'].tolist() == [[0, 2], [1, 3]]
    assert found['none'].shape == (0, 7) and found['one'] == 3


def test_values_that_are_not_those_of_the_checksum(tmp_path):
    by_hand.save(tmp_path / 'x.pt', {'w': np.full(5, 3, np.float32)})
    whole = (tmp_path / 'x.pt').read_bytes()
    at = whole.index(np.full(5, 3, np.float32).tobytes())
    (tmp_path / 'x.pt').write_bytes(whole[:at + 2] + b'\x41' + whole[at + 3:])
    with pytest.raises(UserError, match=r'x\.pt is truncated or damaged \(w: .*checksum'):
        read_all(tmp_path / 'x.pt')


@pytest.mark.parametrize('compression', [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_files_that_torch_does_not_write(tmp_path, compression):
    by_hand.save(tmp_path / 'x.pt', {'w': np.zeros(500, np.float32)}, compression=compression)
    with pytest.raises(UserError, match=r'x\.pt holds a compressed member'):
        open_source(tmp_path / 'x.pt')
    by_hand.save(tmp_path / 'x.pt', {'w': np.zeros(5, np.float32)})
    with zipfile.ZipFile(tmp_path / 'x.pt', 'a') as file, pytest.warns(UserWarning, match='Duplicate'):
        file.writestr('archive/data.pkl', b'')
    with pytest.raises(UserError, match='two members of one name'):
        open_source(tmp_path / 'x.pt')


def test_tensors_without_values_are_named(tmp_path):
    meta = by_hand.name('torch._utils', '_rebuild_meta_tensor_no_storage') + by_hand.tuple_of() + b'R'
    by_hand.save(tmp_path / 'x.pt', {'w': np.ones(2, np.float32)},
                 lambda state: state[:-1] + by_hand.text('far') + meta + b'u')
    source = open_source(tmp_path / 'x.pt')
    assert 'far is no values, saved from the device meta' in source.problem('far', ())
    with pytest.raises(UserError, match=r'x\.pt holds far, whose values cannot be read'):
        source.read('far')


@pytest.mark.parametrize('key, weights, chosen', [
    ('ema', 'ema', 'ema'), ('ema_state_dict', 'ema', 'ema'), ('state_dict_ema', 'ema', 'ema'),
    ('model', 'model', 'model'), ('model_state_dict', 'model', 'model'),
    ('state_dict', 'model', 'state_dict')])
def test_where_trainers_keep_their_weights(tmp_path, key, weights, chosen):
    by_hand.save(tmp_path / 'x.pt', {'w': np.ones(2, np.float32)}, lambda state: by_hand.dict_of(
        {key: state, 'epoch': by_hand.number(3), 'args': by_hand.namespace(model='DiT-XL/2', seed=1)}))
    source = open_source(tmp_path / 'x.pt', weights)
    assert source.weights == chosen and source.told == {'model': 'DiT-XL/2', 'seed': 1}
    assert source.read('w').tolist() == [1, 1] and not source.problems


@pytest.mark.parametrize('name', [
    'module.blocks.0.attn.qkv.weight', 'blocks.0._orig_mod.attn.qkv.weight',
    '_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.attn.qkv.weight',
    'model.diffusion_model.blocks.0.attn.qkv.weight',
    'net.blocks.0._checkpoint_wrapped_module.attn.qkv.weight'])
def test_names_inside_wrappers(tmp_path, name):
    save_file({name: np.ones(2, np.float32)}, tmp_path / 'x.safetensors')
    assert list(open_source(tmp_path / 'x.safetensors').tensors) == ['blocks.0.attn.qkv.weight']


# ------------------------------------------------------------------------------------------------------
# Things that are no checkpoints


@pytest.mark.parametrize('content, message', [
    (b'', 'is empty'),
    (b'<!DOCTYPE html><html><body>404</body></html>', 'is a web page'),
    (b'\n  <html lang="en">', 'is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'Git LFS pointer'),
    (b'{"message": "Not Found"}', 'is no checkpoint'),
    (b'\x93NUMPY\x01\x00v\x00', 'is no checkpoint'),
    (bytes(100), 'is no checkpoint'),
])
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / 'model.pt').write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / 'model.pt')


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        open_source(tmp_path / 'model.pt')


# ------------------------------------------------------------------------------------------------------
# .safetensors


def test_safetensors_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    state = random_state(tiny_arch())
    # told from the content, not from the name
    save_file(state, tmp_path / 'model.bin')
    assert_holds(open_source(tmp_path / 'model.bin'), state)


@pytest.mark.parametrize('keep', [4, 20, -1, -400])
def test_truncated_safetensors(tmp_path, keep):
    save_file(random_state(tiny_arch()), tmp_path / 'model.safetensors')
    whole = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(whole[:keep])
    with pytest.raises(UserError, match='truncated or damaged'):
        open_source(tmp_path / 'model.safetensors')


def test_safetensors_that_names_a_tensor_twice(tmp_path):
    entry = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = b'{' + entry % (0, 4) + b',' + entry % (4, 8) + b'}'
    (tmp_path / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
    with pytest.raises(UserError, match='truncated or damaged'):
        open_source(tmp_path / 'model.safetensors')


@pytest.mark.parametrize('text, message', [
    ('{', 'is not JSON'), ('3', 'its content is 3, expected an object'), ('{}', 'model is None, expected'),
    ('{"model": 3}', 'model is 3, expected'), ('{"model": {"mixer": []}}', 'model.family is None'),
    ('{"model": {"family": "dit", "mixer": {"name": "magic"}}}', 'describe no model'),
])
def test_metadata_that_make_no_sense(tmp_path, text, message):
    save_file({'w': np.ones(2, np.float32)}, tmp_path / 'x.safetensors',
              metadata={torch_files.METADATA_KEY: text})
    with pytest.raises(UserError, match=f'the metadata of .*{message}'):
        open_source(tmp_path / 'x.safetensors')


# ------------------------------------------------------------------------------------------------------
# diffusers folders


def make_hub_folder(folder, state, config, files=1, index=True):
    """Writes a transformer folder in one file or in shards with an index."""
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if files == 1:
        save_file(state, folder / 'diffusion_pytorch_model.safetensors')
        return
    weight_map = {key: f'diffusion_pytorch_model-{i % files + 1:05}-of-{files:05}.safetensors'
                  for i, key in enumerate(state)}
    for name in set(weight_map.values()):
        save_file({key: value for key, value in state.items() if weight_map[key] == name}, folder / name)
    (folder / 'diffusion_pytorch_model.safetensors.index.json').write_text(
        json.dumps({'weight_map': weight_map}))


@pytest.mark.parametrize('files', [1, 3])
@pytest.mark.parametrize('inside', ['', 'transformer'])
def test_hub_folder(tmp_path, files, inside):
    state = to_diffusers(random_state(tiny_arch()), 2)
    make_hub_folder(tmp_path / 'hub' / inside, state, hub_config(tiny_arch()), files)
    if inside:
        names = {'id2label': {'0': 'tench', '1': 'shark', '2': 'hen'}}
        (tmp_path / 'hub' / 'model_index.json').write_text(json.dumps(names))
    source = open_source(tmp_path / 'hub')
    assert_holds(source, state)
    assert source.hub_config['num_layers'] == 2 and len(source.files) == files + 1
    assert source.classes == (['tench', 'shark', 'hen'] if inside else None)


@pytest.mark.peers
def test_hub_folder_with_bin(torch, tmp_path):
    state = to_diffusers(random_state(tiny_arch()), 2)
    (tmp_path / 'config.json').write_text(json.dumps(hub_config(tiny_arch())))
    torch.save(as_tensors(torch, state), tmp_path / 'diffusion_pytorch_model.bin')
    assert_holds(open_source(tmp_path), state)


def test_shards_that_are_missing_or_overlap(tmp_path):
    state = to_diffusers(random_state(tiny_arch()), 2)
    make_hub_folder(tmp_path / 'hub', state, hub_config(tiny_arch()), 2)
    second = tmp_path / 'hub' / 'diffusion_pytorch_model-00002-of-00002.safetensors'
    content = {key: value for i, (key, value) in enumerate(state.items()) if i % 2}
    save_file(content | {'pos_embed.proj.weight': state['pos_embed.proj.weight']}, second)
    assert open_source(tmp_path / 'hub').problems == [
        f'duplicate tensor: pos_embed.proj.weight (again in {second.name})']
    save_file(dict(list(content.items())[1:]), second)
    assert open_source(tmp_path / 'hub').problems == [
        f'missing tensor: {next(iter(content))} (in the index, not in the files)']
    second.unlink()
    with pytest.raises(UserError, match='lacks files that its index names: .*00002-of-00002'):
        open_source(tmp_path / 'hub')


def test_shards_are_read_by_index_and_without_config(tmp_path):
    state = to_diffusers(random_state(tiny_arch()), 2)
    make_hub_folder(tmp_path / 'hub', state, hub_config(tiny_arch()), 3)
    index = tmp_path / 'hub' / 'diffusion_pytorch_model.safetensors.index.json'
    assert_holds(open_source(index), state)
    assert open_source(index).hub_config['num_layers'] == 2
    (tmp_path / 'hub' / 'config.json').unlink()
    for source in (open_source(tmp_path / 'hub'), open_source(index)):
        assert_holds(source, state)
    index.unlink()
    assert_holds(open_source(tmp_path / 'hub'), state)
    (tmp_path / 'hub' / 'diffusion_pytorch_model-00002-of-00003.safetensors').unlink()
    with pytest.raises(UserError, match='hub has 2 of the 3 shards.*number 2'):
        open_source(tmp_path / 'hub')


@pytest.mark.parametrize('name', ['diffusion_pytorch_model.fp16.safetensors', 'model.fp16.safetensors',
                                  'pytorch_model.ema.bin', 'dit_xl.safetensors'])
def test_names_of_single_files_in_folders(tmp_path, name):
    save_file({'w': np.ones(2, np.float16)}, tmp_path / name)
    assert open_source(tmp_path).read('w').tolist() == [1, 1]


def test_shards_of_variants_and_whole_precision_first(tmp_path):
    half, whole = np.zeros(2, np.float16), np.ones(2, np.float32)
    for number, key in ((1, 'a'), (2, 'b')):
        save_file({key: half}, tmp_path / f'model.fp16-0000{number}-of-00002.safetensors')
    (tmp_path / 'model.safetensors.index.fp16.json').write_text(json.dumps({'weight_map': {
        'a': 'model.fp16-00001-of-00002.safetensors', 'b': 'model.fp16-00002-of-00002.safetensors'}}))
    assert set(open_source(tmp_path).tensors) == {'a', 'b'}
    save_file({'a': whole}, tmp_path / 'model.safetensors')
    assert open_source(tmp_path).read('a').tolist() == [1, 1]


def test_several_sets_of_weights_are_not_guessed_at(tmp_path):
    for name in ('one', 'two'):
        save_file({'w': np.ones(2, np.float32)}, tmp_path / f'{name}.safetensors')
    with pytest.raises(UserError, match='several sets of weights.*give one by its own path'):
        open_source(tmp_path)


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / 'x.pt').symlink_to('gone.pt')
    with pytest.raises(UserError, match=r'x\.pt does not exist \(it is a link to gone\.pt'):
        open_source(tmp_path / 'x.pt')
    (tmp_path / 'model.safetensors').symlink_to('model.safetensors')
    with pytest.raises(UserError, match=r'model\.safetensors'):
        open_source(tmp_path)


def test_index_does_not_lead_out_of_its_folder(tmp_path):
    make_hub_folder(tmp_path / 'hub', {'w': np.ones(2, np.float32)}, {}, 2)
    save_file({'w': np.ones(2, np.float32)}, tmp_path / 'outside.safetensors')
    (tmp_path / 'hub' / 'diffusion_pytorch_model.safetensors.index.json').write_text(
        json.dumps({'weight_map': {'w': '../outside.safetensors'}}))
    with pytest.raises(UserError, match='lacks files'):
        open_source(tmp_path / 'hub')


def test_folders_that_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match='holds no weights.*it holds nothing'):
        open_source(tmp_path)
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(UserError, match='holds no weights.*it holds notes.txt'):
        open_source(tmp_path)
    save_file({'w': np.ones(2, np.float32)}, tmp_path / 'diffusion_pytorch_model.safetensors')
    assert open_source(tmp_path).hub_config is None       # the names of the tensors are enough
    (tmp_path / 'config.json').write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(UserError, match='the config of a SanaTransformer2DModel'):
        open_source(tmp_path)
    (tmp_path / 'config.json').write_text('{"num_layers": "two"}')
    with pytest.raises(UserError, match="config.json is damaged: num_layers is 'two', expected an integer"):
        open_source(tmp_path)
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(UserError, match='config.json is damaged: its content is .*, expected an object'):
        open_source(tmp_path)


def test_sha256(tmp_path):
    (tmp_path / 'x').write_bytes(b'abc')
    assert file_sha256(tmp_path / 'x') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


@pytest.mark.parametrize('length', [0x180, 0x0a28])
def test_a_safetensors_file_whose_length_starts_like_a_pickle(tmp_path, length):
    """Its first eight bytes are the length of the header: one in 32 files starts with 0x80, as pickles do."""
    path = tmp_path / 'weights.safetensors'
    for filling in range(length):
        save_file({'w': np.zeros(2, np.float32)}, path, metadata={'note': 'x' * filling})
        if int.from_bytes(path.read_bytes()[:8], 'little') == length:
            break
    assert path.read_bytes()[:2] == length.to_bytes(2, 'little')
    assert np.array_equal(open_source(path).read('w'), np.zeros(2))


def test_a_safetensors_file_whose_length_starts_like_a_zip(tmp_path):
    """0x04034b50 bytes of header; a hole in the file."""
    length, head = 0x04034b50, b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    with open(tmp_path / 'x.safetensors', 'wb') as file:
        file.write(length.to_bytes(8, 'little') + head)
        file.seek(8 + length - 1)
        file.write(b' ' + bytes(8))
    with pytest.raises(UserError, match=r'x\.safetensors is truncated or damaged'):      # zeros are no JSON
        open_source(tmp_path / 'x.safetensors')
