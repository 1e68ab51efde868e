"""Autoencoders under the names of latent-diffusion's code, and VA-VAE's normalised latents."""
import numpy as np
import pytest
from safetensors.numpy import save_file

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.convert.vae_ldm import convert_ldm_vae
from lit_jax.convert.vae_torch import torch_names
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

ARCH = {'widths': (32, 64), 'layers': 1, 'groups': 32, 'channels': 3, 'attention_levels': (1,)}
MEAN, STD = np.array([0.5, -1, 2], np.float32), np.array([2, 0.5, 4], np.float32)


def random_state(seed=0):
    """ARCH's tensors, names written out by hand."""
    rng, shapes = np.random.default_rng(seed), {}

    def layer(name, *shape):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = shape, shape[:1]

    def block(name, inputs, outputs):
        layer(f'{name}.norm1', inputs), layer(f'{name}.conv1', outputs, inputs, 3, 3)
        layer(f'{name}.norm2', outputs), layer(f'{name}.conv2', outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f'{name}.nin_shortcut', outputs, inputs, 1, 1)

    def attention(name):
        layer(f'{name}.norm', 64)
        for part in ('q', 'k', 'v', 'proj_out'):
            layer(f'{name}.{part}', 64, 64, 1, 1)

    for tower, first, last in (('encoder', (32, 3), (6, 64)), ('decoder', (64, 3), (3, 32))):
        layer(f'{tower}.conv_in', *first, 3, 3), layer(f'{tower}.conv_out', *last, 3, 3)
        layer(f'{tower}.norm_out', last[1]), attention(f'{tower}.mid.attn_1')
        block(f'{tower}.mid.block_1', 64, 64), block(f'{tower}.mid.block_2', 64, 64)
    block('encoder.down.0.block.0', 32, 32), block('encoder.down.1.block.0', 32, 64)
    attention('encoder.down.1.attn.0'), layer('encoder.down.0.downsample.conv', 32, 32, 3, 3)
    for level, width, inputs in ((1, 64, 64), (0, 32, 64)):
        block(f'decoder.up.{level}.block.0', inputs, width)
        block(f'decoder.up.{level}.block.1', width, width)
    attention('decoder.up.1.attn.0'), attention('decoder.up.1.attn.1')
    layer('decoder.up.1.upsample.conv', 64, 64, 3, 3)
    layer('quant_conv', 6, 6, 1, 1), layer('post_quant_conv', 3, 3, 1, 1)
    shapes |= {'loss.discriminator.main.0.weight': (4, 3), 'foundation_model.cls_token': (1, 1, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def files(folder, mean=MEAN, std=STD):
    save_file(random_state(), folder / 'vavae.safetensors')
    stats = {'mean': mean.reshape(1, -1, 1, 1), 'std': std.reshape(1, -1, 1, 1)}
    save_file(stats, folder / 'stats.safetensors')
    return folder / 'vavae.safetensors', folder / 'stats.safetensors'


def test_every_tensor_is_in_its_place_and_latents_are_normalised(convert, tmp_path, capsys):
    file, stats = files(tmp_path)
    assert convert(file, '--latents_stats', stats, '--out', tmp_path / 'vae', '--vae_id', 'me/vavae') == 0
    assert '3 channels, scale 1, normalised by mean and deviation' in capsys.readouterr().out
    plain = convert_ldm_vae(file, tmp_path / 'plain')
    assert plain.config['vae'] == VaeNetwork(ARCH).arch and plain.config['id'] == 'vavae'
    vae, raw, state = load_vae(tmp_path / 'vae'), load_vae(tmp_path / 'plain'), random_state()
    assert (vae.id, vae.scale, vae.shift) == ('me/vavae', 1.0, 0.0)
    assert vae.config['normalised'] == {'mean': MEAN.tolist(), 'std': STD.tolist()}
    leaves = named_leaves(raw.params)
    assert sum(leaf.size for leaf in leaves.values()) == sum(
        value.size for key, value in state.items() if key.startswith(('encoder', 'decoder', 'quant', 'post')))
    for ours, theirs in (('encoder/level1/attention0/attn/proj/kernel', 'encoder.down.1.attn.0.proj_out'),
                         ('decoder/level0/attention1/attn/proj/kernel', 'decoder.up.1.attn.1.proj_out'),
                         ('decoder/level1/resnet0/shortcut/kernel', 'decoder.up.0.block.0.nin_shortcut'),
                         ('decoder/mid/resnet1/conv2/kernel', 'decoder.mid.block_2.conv2')):
        kernel = np.asarray(leaves[ours])
        np.testing.assert_array_equal(kernel.reshape(-1),
                                      state[f'{theirs}.weight'].transpose(2, 3, 1, 0).reshape(-1))
    moments, latent = np.random.default_rng(1).standard_normal((2, 6)), np.array([0.3, -2, 1])

    def layer(which, name, x):
        return x @ np.asarray(which.params[name]['kernel'])[0, 0] + np.asarray(which.params[name]['bias'])

    was, now = layer(raw, 'quant_conv', moments), layer(vae, 'quant_conv', moments)
    np.testing.assert_allclose(now[:, :3], (was[:, :3] - MEAN) / STD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(now[:, 3:] / 2), np.exp(was[:, 3:] / 2) / STD, rtol=1e-5)
    np.testing.assert_allclose(layer(vae, 'post_quant_conv', latent),
                               layer(raw, 'post_quant_conv', latent * STD + MEAN), rtol=1e-5, atol=1e-6)


def test_names_of_the_published_configuration():
    names = [name for path in named_leaves(VaeNetwork({
        'widths': (128, 128, 256, 256, 512), 'channels': 32, 'attention_levels': (4,)}).abstract())
             for name in torch_names(path)]
    assert len(names) == len({*names}) == 342
    assert {'encoder.down_blocks.4.attentions.1.to_q.weight',
            'decoder.up_blocks.0.attentions.2.to_out.0.bias'} < {*names}


def test_what_does_not_go_together_is_told(convert, tmp_path):
    file, stats = files(tmp_path, mean=MEAN[:2])
    with pytest.raises(UserError, match='2 and 3 channels, the VAE has 3: .* latents of another VAE'):
        convert_ldm_vae(file, tmp_path / 'vae', latents_stats=stats)
    file, stats = files(tmp_path, std=STD * 0)
    with pytest.raises(UserError, match='std above 0'):
        convert_ldm_vae(file, tmp_path / 'vae', latents_stats=stats)
    with pytest.raises(UserError, match='must hold mean and std of the latents; it holds'):
        convert_ldm_vae(file, tmp_path / 'vae', latents_stats=file)
    with pytest.raises(UserError, match="belongs to a VAE in the form of VA-VAE's file"):
        convert(stats, '--latents_stats', stats, '--out', tmp_path / 'vae')
    assert not (tmp_path / 'vae').exists()
