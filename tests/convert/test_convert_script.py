"""convert_torch_ckpt.py as a user runs it: both ways, what was asked for, and every bad file leaving nothing
behind."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vae_samples
from printed_commands import run_printed
from safetensors import safe_open
from safetensors.numpy import save_file
from torch_samples import LINEAR, SOFTMAX, hub_config, random_state, tiny_arch, to_diffusers
from torchvision_shim import import_oracle

from lit_jax.checkpoint.model_folder import is_model_folder, load_model_folder
from lit_jax.checkpoint.vae_folder import read_vae_config
from lit_jax.convert.torch_export import to_torch_state
from lit_jax.models.network import Network, count_parameters
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import file_sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    """A LiT checkpoint of 4x4 latents with 4 channels."""
    state = random_state(tiny_arch(LINEAR))
    save_file(state, tmp_path / 'lit.safetensors')
    return tmp_path / 'lit.safetensors', state


def test_there_and_back(convert, checkpoint, tmp_path, capsys):
    path, state = checkpoint
    assert convert(path, '--out', tmp_path / 'lit') == 0
    printed = capsys.readouterr().out
    for words in ('linear attention (heads 2', '4x4x4, 3 classes', f'written  {tmp_path / "lit"}',
                  'python sample.py'):
        assert words in printed
    config, params = load_model_folder(tmp_path / 'lit')
    assert config['model'] == tiny_arch(LINEAR)
    assert f'numbers  {count_parameters(Network(config["model"])):,} parameters' in printed     # as a dry run
    assert config['latent'] == {'space': 'vae', 'vae': 'stabilityai/sd-vae-ft-ema', 'scale': 0.18215,
                                'downscale': 8}
    assert config['diffusion'] == {'kind': 'ddpm', 'steps': 1000, 'schedule': 'linear'}
    assert config['classes'] is None
    assert config['provenance']['source'] == 'lit.safetensors'
    assert config['provenance']['sha256'] == file_sha256(path)
    back = to_torch_state(params, config['model'])
    assert all(np.array_equal(back[key], state[key]) for key in state)
    convert(tmp_path / 'lit', '--to_torch', '--out', tmp_path / 'back.safetensors')
    with safe_open(tmp_path / 'back.safetensors', framework='numpy') as file:
        assert set(file.keys()) == set(state)
        assert all(np.array_equal(file.get_tensor(key), state[key]) for key in state)


@pytest.mark.peers
def test_training_checkpoint(convert, tmp_path):
    import torch
    states = {name: random_state(tiny_arch(), seed) for seed, name in enumerate(('model', 'ema'))}
    torch.save({name: {key: torch.from_numpy(value) for key, value in state.items()}
                for name, state in states.items()},
               tmp_path / '0050000.pt')
    for name, state in states.items():
        convert(tmp_path / '0050000.pt', '--weights', name, '--heads', 2, '--out', tmp_path / name)
        config, params = load_model_folder(tmp_path / name)
        assert config['provenance']['weights'] == name
        assert np.array_equal(params['y_embedder']['table'], state['y_embedder.embedding_table.weight'])


def test_hub_folder(convert, tmp_path):
    state = random_state(tiny_arch())
    folder = tmp_path / 'hub' / 'transformer'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(hub_config(tiny_arch())))
    save_file(to_diffusers(state, 2), folder / 'diffusion_pytorch_model.safetensors')
    (tmp_path / 'hub' / 'model_index.json').write_text(
        json.dumps({'id2label': {'0': 'a', '1': 'b', '2': 'c'}}))
    convert(tmp_path / 'hub', '--out', tmp_path / 'dit')
    config, params = load_model_folder(tmp_path / 'dit')
    assert config['model'] == tiny_arch() and config['classes'] == ['a', 'b', 'c']
    assert set(config['provenance']['sha256']) == {'config.json', 'diffusion_pytorch_model.safetensors'}
    back = to_torch_state(params, config['model'])
    assert all(np.array_equal(back[key], state[key]) for key in state)
    (folder / 'config.json').write_text(json.dumps({**hub_config(tiny_arch()), 'num_layers': 3,
                                                    'sample_size': 8}))
    with pytest.raises(UserError, match='config.json says num_layers 3, the tensors say 2'):
        convert(tmp_path / 'hub', '--out', tmp_path / 'other')


@pytest.mark.peers
def test_a_folder_that_diffusers_wrote(convert, tmp_path):
    """Names and config as the library itself saves them, in shards of .safetensors and as one .bin."""
    import torch
    diffusers = import_oracle('diffusers')
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4,
                                            out_channels=8, num_layers=3, sample_size=4, patch_size=2,
                                            num_embeds_ada_norm=5)
    # fresh models have another embedder in every block, trained ones not
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    model.save_pretrained(tmp_path / 'bin' / 'transformer', safe_serialization=False)
    for name in ('shards', 'bin'):
        convert(tmp_path / name, '--out', tmp_path / f'{name}_out')
        config, params = load_model_folder(tmp_path / f'{name}_out')
        assert config['model'] == tiny_arch(depth=3, num_classes=5)
        state = to_torch_state(params, config['model'])
        block = model.transformer_blocks[2]
        third = block.attn1.to_k.weight.detach().numpy()
        assert np.array_equal(state['blocks.2.attn.qkv.weight'][16:32], third)
        assert np.array_equal(state['blocks.2.mlp.fc2.weight'], block.ff.net[2].weight.detach().numpy())
        assert np.array_equal(state['final_layer.linear.bias'], model.proj_out_2.bias.detach().numpy())
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1


def write_pipeline(folder):
    """A class-conditional pipeline of diffusers: folder/transformer and folder/vae."""
    parts = {'transformer': (hub_config(tiny_arch(channels=2)),
                             to_diffusers(random_state(tiny_arch(channels=2)), 2)),
             'vae': ({**vae_samples.HUB, 'scaling_factor': 0.5}, vae_samples.random_state())}
    for name, (config, state) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / 'config.json').write_text(json.dumps(config))
        save_file(state, folder / name / 'diffusion_pytorch_model.safetensors')
    (folder / 'model_index.json').write_text('{}')


@pytest.mark.parametrize('src', ['', 'transformer', 'transformer/diffusion_pytorch_model.safetensors'])
def test_the_latent_space_is_that_of_the_vae_in_the_pipeline(convert, tmp_path, monkeypatch, capsys, src):
    """Under the name that the converted VAE has, wherever in the pipeline the converter is pointed."""
    write_pipeline(tmp_path / 'my_pipe')
    monkeypatch.chdir(tmp_path)
    convert(f'my_pipe/{src}', '--out', 'models/dit')
    said = capsys.readouterr().out
    latent = load_model_folder('models/dit')[0]['latent']
    assert latent == {'space': 'vae', 'vae': 'my_pipe', 'scale': 0.5, 'downscale': 2}
    assert 'of the VAE my_pipe, scale 0.5, downscale 2\n' in said and '(assumed; otherwise' not in said
    first, second = said.partition('next     ')[2].splitlines()
    convert(*shlex.split(first)[2:])
    assert read_vae_config('models/dit_vae')['id'] == 'my_pipe'
    assert second.split() == ['python', 'sample.py', '--from', 'models/dit', '--vae', 'models/dit_vae',
                              '--classes', '0,1', '--out', 'grid.png']


def test_the_next_command_names_the_vae_or_says_that_it_is_missing(convert, checkpoint, tmp_path,
                                                                   monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = (checkpoint[0], '--vae', 'mine', '--out', 'models/a', '--overwrite')
    convert(*asked)
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        '--out grid.png      # latents in false colours; images need --vae FOLDER, mine converted')
    write_pipeline(tmp_path / 'pipe')
    convert('pipe/vae', '--vae_id', 'mine', '--out', 'models/b')
    convert(*asked)
    assert capsys.readouterr().out.splitlines()[-1].endswith('--from models/a --vae models/b --classes 0,1 '
                                                             '--out grid.png')


def test_what_is_assumed_is_said_with_the_flag_for_it(convert, checkpoint, tmp_path, capsys):
    convert(checkpoint[0], '--out', tmp_path / 'a')
    said = capsys.readouterr().out
    assert ('latent   of the VAE stabilityai/sd-vae-ft-ema, scale 0.18215, downscale 8 (assumed; otherwise '
            '--vae ID, --latent_scale S, --downscale N, --space vae or pixels)') in said
    assert 'predicts noise and its variance; linear schedule of 1000 steps (assumed' in said
    convert(checkpoint[0], '--out', tmp_path / 'b', '--vae', 'mine', '--latent_scale', 0.5)
    said = capsys.readouterr().out
    assert 'of the VAE mine, scale 0.5, downscale 8 (assumed; otherwise --downscale N)' in said
    convert(tmp_path / 'b', '--to_torch', '--out', tmp_path / 'c d.safetensors')
    back = shlex.split(capsys.readouterr().out.partition('next     ')[2], comments=True)
    convert(*back[2:])
    assert '(assumed' not in capsys.readouterr().out      # a file of ours says everything


@pytest.mark.slow
@pytest.mark.parametrize('name', ['digits_dit', 'shapes_pixart'])
def test_the_commands_that_it_prints_run(tmp_path, name):
    said = run_printed(f'python convert_torch_ckpt.py assets/{name}.safetensors --out models/mine', tmp_path)
    commands = said.partition('next     ')[2].splitlines()
    for line in commands:
        run_printed(line.strip(), tmp_path)
    assert 'sample.py' in commands[-1] and (tmp_path / 'grid.png').exists()


def test_latent_can_be_told(convert, checkpoint, tmp_path):
    convert(checkpoint[0], '--out', tmp_path / 'a', '--vae', 'mine/vae', '--latent_scale', 0.5)
    assert load_model_folder(tmp_path / 'a')[0]['latent'] == {'space': 'vae', 'vae': 'mine/vae', 'scale': 0.5,
                                                              'downscale': 8}
    convert(checkpoint[0], '--out', tmp_path / 'b', '--space', 'pixels')
    assert load_model_folder(tmp_path / 'b')[0]['latent'] == {'space': 'pixels', 'vae': None, 'scale': 1.0,
                                                              'downscale': 1}
    save_file(random_state(tiny_arch(LINEAR, channels=1)), tmp_path / 'grey.safetensors')
    convert(tmp_path / 'grey.safetensors', '--out', tmp_path / 'c', '--activation', 'gelu', '--focus_power',
            3)
    config = load_model_folder(tmp_path / 'c')[0]
    assert config['latent']['space'] == 'pixels'
    assert config['model']['mixer']['activation'] == 'gelu' and config['model']['mixer']['focus_power'] == 3


@pytest.mark.parametrize('arguments, message', [
    (['--arch', 'lit_s'], r'weights of depth 2, width 16 there, S weights \(depth 12, width 384\) asked for'),
    (['--arch', 'dit_xl'], 'mixer: linear there, softmax asked for'),
    (['--image_size', '512'],
     r'trained for 32x32 pixels \(latent 4x4\), asked for 512x512 pixels \(latent 64x64\)'),
    (['--image_size', '250'], 'image size 250 is not divisible by 8'),
    (['--num_classes', '1000'], 'num_classes: 3 there, 1000 asked for'),
    (['--heads', '4'], 'heads: 2 there, 4 asked for|the model has 2 heads, not 4'),
    (['--heads', '3'], '3 heads do not divide the width 16'),
])
def test_another_model_than_asked_for(convert, checkpoint, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        convert(checkpoint[0], '--out', tmp_path / 'out', *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['lit.safetensors']


def test_bad_tensors_leave_nothing(convert, checkpoint, tmp_path):
    path, state = checkpoint
    state['blocks.1.mlp.fc1.weight'][2, 3] = np.nan
    del state['final_layer.linear.bias']
    save_file(state, path)
    with pytest.raises(UserError) as error:
        convert(path, '--out', tmp_path / 'out')
    assert 'non-finite values in tensor: blocks.1.mlp.fc1.weight' in str(error.value)
    assert 'missing tensor: final_layer.linear.bias' in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ['lit.safetensors']


def test_output_in_the_way(convert, checkpoint, tmp_path):
    """Refused before anything is read; --overwrite replaces a model folder and nothing else."""
    path, _ = checkpoint
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'mine.txt').write_text('keep')
    with pytest.raises(UserError, match='exists and is not empty. Choose another folder'):
        convert(tmp_path / 'no such file', '--out', tmp_path / 'notes')
    with pytest.raises(UserError, match='not a model folder, so it will not be overwritten'):
        convert(path, '--out', tmp_path / 'notes', '--overwrite')
    assert (tmp_path / 'notes' / 'mine.txt').read_text() == 'keep'
    convert(path, '--out', tmp_path / 'model')
    save_file(random_state(tiny_arch(LINEAR), 5), path)
    convert(path, '--out', tmp_path / 'model', '--overwrite')
    assert load_model_folder(tmp_path / 'model')[0]['provenance']['sha256'] == file_sha256(path)
    with pytest.raises(UserError, match='a model folder already; --to_torch'):
        convert(tmp_path / 'model', '--out', tmp_path / 'again')


def test_name_list_that_does_not_fit(convert, tmp_path):
    config = {'model': tiny_arch(SOFTMAX), 'classes': ['only one']}
    save_file(random_state(tiny_arch()), tmp_path / 'x.safetensors', metadata={'lit_jax': json.dumps(config)})
    with pytest.raises(UserError, match='names 1 of its 3 classes'):
        convert(tmp_path / 'x.safetensors', '--out', tmp_path / 'out')


def test_metadata_that_contradicts_the_tensors(convert, tmp_path):
    """A file whose metadata describe another model: the tensors are measured by it, and nothing is
    written."""
    config = {'model': tiny_arch(SOFTMAX, width=32)}
    save_file(random_state(tiny_arch()), tmp_path / 'x.safetensors', metadata={'lit_jax': json.dumps(config)})
    with pytest.raises(UserError, match='misshaped tensor: x_embedder.proj.weight'):
        convert(tmp_path / 'x.safetensors', '--out', tmp_path / 'out')


def test_error_is_one_message_without_traceback(tmp_path):
    """The real process: exit status 1, the message on stderr, no traceback, nothing written."""
    (tmp_path / 'model.pt').write_text('<!DOCTYPE html><html>Sign in</html>')
    done = subprocess.run([sys.executable, 'convert_torch_ckpt.py', str(tmp_path / 'model.pt'), '--out',
                           str(tmp_path / 'out')], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: ') and 'is a web page' in done.stderr \
        and 'Traceback' not in done.stderr
    assert not (tmp_path / 'out').exists() and not is_model_folder(tmp_path / 'out')
