"""Random little autoencoders as diffusers folders, for the tests of their converter and of VAE folders."""
import json

import numpy as np
from safetensors.numpy import save_file

from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.leaves import named_leaves

ARCH = {'widths': (8, 16), 'layers': 1, 'groups': 4, 'channels': 2}
HUB = {'_class_name': 'AutoencoderKL', '_diffusers_version': '0.4.2', 'act_fn': 'silu',
       'block_out_channels': [8, 16],
       'down_block_types': ['DownEncoderBlock2D'] * 2, 'in_channels': 3, 'latent_channels': 2,
       'layers_per_block': 1, 'norm_num_groups': 4, 'out_channels': 3, 'sample_size': 32,
       'up_block_types': ['UpDecoderBlock2D'] * 2}
_RESNETS = {'encoder': {'down_blocks.0.resnets.0': (8, 8), 'down_blocks.1.resnets.0': (8, 16)},
            'decoder': {'up_blocks.0.resnets.0': (16, 16), 'up_blocks.0.resnets.1': (16, 16),
                        'up_blocks.1.resnets.0': (16, 8), 'up_blocks.1.resnets.1': (8, 8)}}


def random_params(arch=ARCH, seed=0) -> dict:
    """A parameter tree of `arch` with normal values, float32 numpy."""
    import jax
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
                        VaeNetwork(arch).abstract())


def random_state(seed=0, *, old=False) -> dict[str, np.ndarray]:
    """The state dict of `HUB` under diffusers' names (facts of the published files), written out by hand."""
    shapes: dict[str, tuple] = {}

    def conv(name, inputs, outputs, size=3):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = (outputs, inputs, size, size), (outputs,)

    def norm(name, width):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = (width,), (width,)

    for tower, ends in {'encoder': (3, 8, 16, 4), 'decoder': (2, 16, 8, 3)}.items():
        conv(f'{tower}.conv_in', ends[0], ends[1])
        norm(f'{tower}.conv_norm_out', ends[2])
        conv(f'{tower}.conv_out', ends[2], ends[3])
        middle = {f'mid_block.resnets.{i}': (16, 16) for i in range(2)}
        for name, (inputs, outputs) in {**_RESNETS[tower], **middle}.items():
            norm(f'{tower}.{name}.norm1', inputs)
            conv(f'{tower}.{name}.conv1', inputs, outputs)
            norm(f'{tower}.{name}.norm2', outputs)
            conv(f'{tower}.{name}.conv2', outputs, outputs)
            if inputs != outputs:
                conv(f'{tower}.{name}.conv_shortcut', inputs, outputs, 1)
        attention = f'{tower}.mid_block.attentions.0'
        norm(f'{attention}.group_norm', 16)
        for part in ('query', 'key', 'value', 'proj_attn') if old else ('to_q', 'to_k', 'to_v', 'to_out.0'):
            shapes[f'{attention}.{part}.weight'], shapes[f'{attention}.{part}.bias'] = (16, 16), (16,)
    conv('encoder.down_blocks.0.downsamplers.0.conv', 8, 8)
    conv('decoder.up_blocks.0.upsamplers.0.conv', 16, 16)
    conv('quant_conv', 4, 4, 1)
    conv('post_quant_conv', 2, 2, 1)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_hub_folder(folder, state=None, config=HUB, file='diffusion_pytorch_model.safetensors'):
    """A diffusers folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    # as diffusers does
    save_file(random_state() if state is None else state, folder / file, metadata={'format': 'pt'})
    return folder


def same_trees(a, b) -> bool:
    a, b = named_leaves(a), named_leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
