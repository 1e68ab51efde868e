"""diffusers' AutoencoderKL folders: every tensor in its place, the same images as PyTorch, and each mistake
named."""
import json

import numpy as np
import pytest
from torch_samples import hub_config, tiny_arch
from torchvision_shim import import_oracle
from vae_samples import HUB, random_state, same_trees, write_hub_folder

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.convert.torch_files import hub_parts
from lit_jax.convert.torch_import import convert
from lit_jax.convert.vae_torch import arch_of, convert_vae, is_hub_vae, torch_names
from lit_jax.models.vae import SD_ARCH, VaeNetwork
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.runtime.paths import file_sha256

WEIGHTS = 'diffusion_pytorch_model.safetensors'


# ------------------------------------------------------------------------------------------------------
# Names and values


def test_the_script_recognises_a_vae(convert, tmp_path, capsys):
    state = random_state()
    hub = write_hub_folder(tmp_path / 'sd-vae-ft-mse', state)
    assert is_hub_vae(hub)
    assert convert(hub, '--out', tmp_path / 'vae') == 0
    printed = capsys.readouterr().out
    for words in ('stabilityai/sd-vae-ft-mse (from the folder\'s name', 'widths 8, 16',
                  '2 channels, scale 0.18215', f'written  {tmp_path / "vae"}'):
        assert words in printed
    vae = load_vae(tmp_path / 'vae')
    assert (vae.id, vae.scale, vae.shift) == ('stabilityai/sd-vae-ft-mse', 0.18215, 0.0)
    assert vae.sha256 == file_sha256(hub / WEIGHTS)
    assert vae.config['provenance']['source'] == 'sd-vae-ft-mse'
    down = vae.params['encoder']['level0']['resample']['kernel']
    assert np.array_equal(down,
                          state['encoder.down_blocks.0.downsamplers.0.conv.weight'].transpose(2, 3, 1, 0))
    qkv = np.asarray(vae.params['decoder']['mid']['attention']['attn']['qkv']['kernel'])
    assert qkv.shape == (16, 3, 1, 16)
    for i, part in enumerate('qkv'):
        assert np.array_equal(qkv[:, i, 0], state[f'decoder.mid_block.attentions.0.to_{part}.weight'].T)
    proj = np.asarray(vae.params['decoder']['mid']['attention']['attn']['proj']['kernel'])
    assert np.array_equal(proj[0], state['decoder.mid_block.attentions.0.to_out.0.weight'].T)


def test_old_attention_names_give_the_same_parameters(tmp_path):
    for name, old in (('new', False), ('old', True)):
        convert_vae(write_hub_folder(tmp_path / name, random_state(old=old)), tmp_path / f'{name}_out')
    assert same_trees(load_vae(tmp_path / 'new_out').params, load_vae(tmp_path / 'old_out').params)


def assert_same_vae(tmp_path, name, state):
    """The VAE folder made from the hub folder `name` holds what one whole file of these tensors gives."""
    for each in (write_hub_folder(tmp_path / 'whole', state), tmp_path / name):
        convert_vae(each, tmp_path / f'{each.name}_out')
    want, vae = load_vae(tmp_path / 'whole_out'), load_vae(tmp_path / f'{name}_out')
    assert same_trees(vae.params, want.params)
    assert len(vae.sha256) == 64 and vae.sha256 != want.sha256


def test_shards_give_the_same_parameters(tmp_path):
    state, (first, *rest) = random_state(), sorted(random_state())
    shards = write_hub_folder(tmp_path / 'shards', {first: state[first]},
                              file='diffusion_pytorch_model-00001-of-00002.safetensors')
    write_hub_folder(shards, {key: state[key] for key in rest},
                     file='diffusion_pytorch_model-00002-of-00002.safetensors')
    assert_same_vae(tmp_path, 'shards', state)
    (tmp_path / 'shards' / 'diffusion_pytorch_model-00001-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match='shards has 1 of the 2 shards of its weights'):
        convert_vae(tmp_path / 'shards', tmp_path / 'other')


@pytest.mark.peers
def test_a_bin_file_gives_the_same_parameters(tmp_path):
    import torch
    state = random_state()
    binary = write_hub_folder(tmp_path / 'bin', state)
    (binary / WEIGHTS).unlink()
    torch.save({key: torch.from_numpy(value) for key, value in state.items()},
               binary / 'diffusion_pytorch_model.bin')
    assert_same_vae(tmp_path, 'bin', state)


def test_half_precision_files_are_read_as_float32(tmp_path):
    state = {key: value.astype(np.float16) for key, value in random_state().items()}
    convert_vae(write_hub_folder(tmp_path / 'hub', state, file='diffusion_pytorch_model.fp16.safetensors'),
                tmp_path / 'vae')
    bias = load_vae(tmp_path / 'vae').params['encoder']['conv_in']['bias']
    assert bias.dtype == np.float32 and np.array_equal(bias, state['encoder.conv_in.bias'].astype(np.float32))


def test_names_of_the_full_configuration():
    """Facts of the published files: 248 tensors, up_blocks.0 the deepest, three blocks a level in the
    decoder."""
    names = [name for path in named_leaves(VaeNetwork({}).abstract()) for name in torch_names(path)]
    assert len(names) == len({*names}) == 248
    for name in ('decoder.up_blocks.3.resnets.0.conv_shortcut.weight',
                 'decoder.up_blocks.3.resnets.2.norm2.bias',
                 'decoder.up_blocks.2.upsamplers.0.conv.bias',
                 'encoder.down_blocks.1.resnets.0.conv_shortcut.weight',
                 'encoder.mid_block.attentions.0.to_out.0.weight', 'encoder.conv_norm_out.weight',
                 'quant_conv.weight'):
        assert name in names
    assert 'decoder.up_blocks.3.upsamplers.0.conv.bias' not in names
    old = [name for path in named_leaves(VaeNetwork({}).abstract()) for name in torch_names(path, old=True)]
    assert 'decoder.mid_block.attentions.0.proj_attn.bias' in old and not [
        name for name in old if '.to_' in name]


@pytest.mark.parametrize('parts, vae_id, want', [
    (['sdxl-vae'], None, 'stabilityai/sdxl-vae'), (['vae of mine'], None, 'vae of mine'),
    (['sdxl-vae'], 'me/it', 'me/it'), (['models--madebyollin--sdxl-vae-fp16-fix', 'snapshots', '207b116'],
                                       None, 'madebyollin/sdxl-vae-fp16-fix')])
def test_the_id_is_told_or_read_from_the_folder(tmp_path, parts, vae_id, want):
    done = convert_vae(write_hub_folder(tmp_path.joinpath(*parts)), tmp_path / 'vae', vae_id=vae_id)
    assert load_vae(tmp_path / 'vae').id == done.config['id'] == want


# ------------------------------------------------------------------------------------------------------
# config.json


def test_published_configurations():
    """The fields that sd-vae-ft-ema, the SDXL VAE and a VAE without the 1 x 1 convolutions have in their
    config.json."""
    common = {'_class_name': 'AutoencoderKL', 'act_fn': 'silu', 'block_out_channels': [128, 256, 512, 512],
              'down_block_types': ['DownEncoderBlock2D'] * 4, 'up_block_types': ['UpDecoderBlock2D'] * 4,
              'in_channels': 3, 'out_channels': 3, 'layers_per_block': 2, 'norm_num_groups': 32,
              'latent_channels': 4}
    assert arch_of(common, 'here') == (SD_ARCH, 0.18215, 0.0)
    sdxl = {**common, 'scaling_factor': 0.13025, 'force_upcast': True, 'sample_size': 1024,
            'latents_mean': None, 'latents_std': None, 'shift_factor': None}
    assert arch_of(sdxl, 'here') == (SD_ARCH, 0.13025, 0.0)
    flux = {**common, 'latent_channels': 16, 'scaling_factor': 0.3611, 'shift_factor': 0.1159,
            'use_quant_conv': False, 'use_post_quant_conv': False, 'mid_block_add_attention': True}
    assert arch_of(flux, 'here') == ({**SD_ARCH, 'channels': 16, 'quant_conv': False,
                                      'post_quant_conv': False}, 0.3611, 0.1159)


@pytest.mark.parametrize('change, words', [
    ({'down_block_types': ['DownEncoderBlock2D', 'CrossAttnDownBlock2D']},
     'down_block_types .*only DownEncoderBlock2D and AttnDownEncoderBlock2D are known'),
    ({'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']}, 'attention at different levels'),
    ({'up_block_types': ['UpDecoderBlock2D'] * 3}, 'up_block_types has 3 entries, block_out_channels 2'),
    ({'act_fn': 'gelu'}, 'act_fn is \'gelu\''), ({'out_channels': 4}, 'out_channels is 4'),
    ({'latents_mean': [0.1, 0.2]}, 'latents_mean'),
    ({'scaling_factor': None}, 'scaling_factor must be a number'),
    ({'norm_num_groups': 3}, 'norm_num_groups'), ({'layers_per_block': '2'}, 'layers_per_block'),
    ({'_class_name': 'AutoencoderTiny'}, 'holds a AutoencoderTiny; lit_jax reads VAEs of the class '
                                         'AutoencoderKL')])
def test_configurations_that_lit_jax_does_not_have_are_refused(convert, tmp_path, change, words):
    hub = write_hub_folder(tmp_path / 'hub', config={**HUB, **change})
    with pytest.raises(UserError, match=words):
        convert(hub, '--out', tmp_path / 'vae')
    assert not (tmp_path / 'vae').exists()


# ------------------------------------------------------------------------------------------------------
# Mistakes


def test_everything_wrong_with_the_tensors_is_told_at_once(tmp_path):
    state = random_state()
    del state['encoder.mid_block.attentions.0.to_k.bias'], state['quant_conv.weight']
    state['decoder.conv_in.weight'] = state['decoder.conv_in.weight'][:, :1].copy()
    state['encoder.conv_out.bias'] = np.full_like(state['encoder.conv_out.bias'], np.nan)
    state['decoder.conv_out.bias'] = state['decoder.conv_out.bias'].astype(np.float64)
    state['loss.logvar'] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as caught:
        convert_vae(write_hub_folder(tmp_path / 'hub', state), tmp_path / 'vae')
    for words in ('missing tensor: encoder.mid_block.attentions.0.to_k.bias [16]',
                  'missing tensor: quant_conv.weight',
                  'misshaped tensor: decoder.conv_in.weight has [16, 1, 3, 3], expected [16, 2, 3, 3]',
                  'non-finite values in tensor: encoder.conv_out.bias',
                  'wrong dtype in tensor: decoder.conv_out.bias',
                  'unexpected tensor: loss.logvar'):
        assert words in str(caught.value)
    assert str(caught.value).count('\n') == 6
    assert not (tmp_path / 'vae').exists()


def test_folders_that_are_no_vae(tmp_path):
    hub = write_hub_folder(tmp_path / 'hub')
    (hub / 'config.json').rename(tmp_path / 'config.json')
    with pytest.raises(UserError, match='has no config.json'):
        convert_vae(hub, tmp_path / 'vae')
    (tmp_path / 'pipeline').mkdir()
    hub.rename(tmp_path / 'pipeline' / 'vae')
    (tmp_path / 'config.json').rename(tmp_path / 'pipeline' / 'vae' / 'config.json')
    with pytest.raises(UserError, match=r'pipeline/vae has one: give that'):
        convert_vae(tmp_path / 'pipeline', tmp_path / 'vae')
    (tmp_path / 'pipeline' / 'vae' / WEIGHTS).unlink()
    with pytest.raises(UserError, match='holds no weights: expected'):
        convert_vae(tmp_path / 'pipeline' / 'vae', tmp_path / 'vae')
    (tmp_path / 'pipeline' / 'vae' / 'config.json').write_text(json.dumps(hub_config(tiny_arch())))
    assert not is_hub_vae(tmp_path / 'pipeline' / 'vae') and not is_hub_vae(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='holds a DiTTransformer2DModel'):
        convert_vae(tmp_path / 'pipeline' / 'vae', tmp_path / 'vae')


def test_damaged_weights_and_targets_in_use(convert, tmp_path):
    hub = write_hub_folder(tmp_path / 'hub')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'diary.txt').write_text('dear')
    for flags, words in ([], 'exists and is not empty'), (['--overwrite'], 'not a VAE folder'):
        with pytest.raises(UserError, match=words):
            convert(hub, '--out', tmp_path / 'full', *flags)
    with pytest.raises(UserError, match='is a VAE, --arch, --heads is for diffusion models'):
        convert(hub, '--arch', 'dit_xl', '--heads', 2, '--out', tmp_path / 'vae')
    (hub / WEIGHTS).write_bytes((hub / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match='truncated or damaged'):
        convert(hub, '--out', tmp_path / 'vae')
    assert not (tmp_path / 'vae').exists()


@pytest.mark.peers
def test_nothing_pickled_is_run(tmp_path):
    import torch
    hub = write_hub_folder(tmp_path / 'hub')
    (hub / WEIGHTS).unlink()
    torch.save({'encoder.conv_in.weight': Bomb(tmp_path / 'went off')}, hub / 'diffusion_pytorch_model.bin')
    with pytest.raises(UserError, match='is refused: it asks for'):
        convert_vae(hub, tmp_path / 'vae')
    assert not (tmp_path / 'went off').exists()


class Bomb:
    """Writes a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


# ------------------------------------------------------------------------------------------------------
# Against PyTorch


def relative_error(got, want):
    want = want.detach().numpy().transpose(0, 2, 3, 1)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def compare_with_diffusers(tmp_path, config, sides, batch=1):
    """The largest relative difference of mean, logvar and pixels, through a folder that diffusers itself
    saved."""
    import torch
    diffusers = import_oracle('diffusers')
    torch.manual_seed(0)
    levels = len(config['block_out_channels'])
    types = {'down_block_types': ['DownEncoderBlock2D'] * levels,
             'up_block_types': ['UpDecoderBlock2D'] * levels}
    theirs = diffusers.AutoencoderKL(**{**types, **config}).eval()
    theirs.save_pretrained(tmp_path / 'hub')
    convert_vae(tmp_path / 'hub', tmp_path / 'vae')
    ours, rng = load_vae(tmp_path / 'vae'), np.random.default_rng(0)
    image = rng.uniform(-1, 1, (batch, 3, *sides)).astype(np.float32)
    latent = rng.normal(size=(batch, ours.network.channels,
                              *(side // ours.network.downscale for side in sides)))
    latent = latent.astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(image)).latent_dist
        pixels = theirs.decode(torch.from_numpy(latent)).sample
    mean, logvar = ours.encode(image.transpose(0, 2, 3, 1))
    assert ours.scale == theirs.config.scaling_factor
    return max(relative_error(mean, posterior.mean), relative_error(logvar, posterior.logvar),
               relative_error(ours.decode(latent.transpose(0, 2, 3, 1)), pixels))


@pytest.mark.peers
@pytest.mark.parametrize('config, sides', [
    ({'block_out_channels': (8, 12, 16), 'norm_num_groups': 4, 'layers_per_block': 2,
      'scaling_factor': 0.13025}, (12, 20)),
    ({'block_out_channels': (8,), 'norm_num_groups': 8, 'latent_channels': 16, 'use_quant_conv': False,
      'use_post_quant_conv': False, 'shift_factor': 0.1}, (5, 9)),
    ({'block_out_channels': (8, 16), 'norm_num_groups': 2, 'mid_block_add_attention': False}, (6, 4)),
    ({'block_out_channels': (8, 12), 'norm_num_groups': 4, 'latent_channels': 6, 'layers_per_block': 2,
      'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'],      # as VA-VAE
      'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D']}, (8, 12))])
def test_small_configurations_equal_diffusers(tmp_path, config, sides):
    assert compare_with_diffusers(tmp_path, config, sides, batch=2) <= 2e-5


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize('scale, sides', [(0.18215, (128, 64)), (0.13025, (64, 64))])
def test_the_full_configuration_equals_diffusers(tmp_path, scale, sides):
    config = {'block_out_channels': (128, 256, 512, 512), 'layers_per_block': 2, 'scaling_factor': scale}
    assert compare_with_diffusers(tmp_path, config, sides) <= 2e-5


def test_single_files_of_a_folder_are_its_network(tmp_path):
    folder = write_hub_folder(tmp_path / 'vae')
    file = next(folder.glob('*.safetensors'))
    for path in (file, folder / 'config.json'):
        assert hub_parts(path)[0] == folder
    assert convert_vae(file, tmp_path / 'out').config['vae']['widths'] == (8, 16)
    (folder / 'config.json').unlink()
    with pytest.raises(UserError, match='give that') as error:
        convert(file, tmp_path / 'other')
    assert str(file) in str(error.value) and 'with config.json' in str(error.value)
