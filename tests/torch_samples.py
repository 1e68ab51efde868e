"""Random little models as PyTorch state dicts, for the tests of the converter."""
import numpy as np

from lit_jax.convert.torch_export import to_torch_state
from lit_jax.convert.torch_keys import model_leaves
from lit_jax.runtime.leaves import unflatten

SOFTMAX = {'name': 'softmax', 'heads': 2, 'qkv_bias': True}
LINEAR = {'name': 'linear', 'heads': 2, 'qkv_bias': False, 'dwc_kernel': 3, 'activation': 'relu',
          'focus_power': 0}


def tiny_arch(mixer=SOFTMAX, **changes) -> dict:
    """Depth 2, width 16, 4x4 latents, 3 classes."""
    arch = {'family': 'dit', 'depth': 2, 'width': 16, 'patch': 2, 'input_size': [4, 4], 'channels': 4,
            'num_classes': 3, 'mlp_ratio': 4.0, 'learn_sigma': True, 'mixer': dict(mixer), 'ffn': 'mlp',
            'stages': []}
    return {**arch, **changes}


def random_params(arch, seed=0) -> dict:
    """A parameter tree of `arch` with normal values, float32 numpy."""
    rng = np.random.default_rng(seed)
    shapes = {leaf.path: (() if leaf.blocks is None else (len(leaf.blocks),)) + leaf.shape
              for leaf in model_leaves(arch)}
    return unflatten({path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()})


def random_null(arch, seed=0) -> np.ndarray | None:
    """Features [L, Y] of the empty caption, of a PixArt."""
    if arch['family'] != 'pixart':
        return None
    shape = arch['caption_tokens'], arch['caption_channels']
    return np.random.default_rng((seed, 1)).standard_normal(shape).astype(np.float32)


def random_state(arch, seed=0) -> dict[str, np.ndarray]:
    """The same as a PyTorch state dict, position table included."""
    return to_torch_state(random_params(arch, seed), arch, null_caption=random_null(arch))


def to_diffusers(state, depth) -> dict[str, np.ndarray]:
    """The same weights under diffusers' names, written out by hand (facts of the published conversion)."""
    hub = {}
    for end in ('weight', 'bias'):
        hub[f'pos_embed.proj.{end}'] = state[f'x_embedder.proj.{end}']
        hub[f'proj_out_1.{end}'] = state[f'final_layer.adaLN_modulation.1.{end}']
        hub[f'proj_out_2.{end}'] = state[f'final_layer.linear.{end}']
        for i in range(depth):
            ours, theirs = f'blocks.{i}.', f'transformer_blocks.{i}.'
            embedder = f'{theirs}norm1.emb.'
            hub[f'{embedder}timestep_embedder.linear_1.{end}'] = state[f't_embedder.mlp.0.{end}']
            hub[f'{embedder}timestep_embedder.linear_2.{end}'] = state[f't_embedder.mlp.2.{end}']
            hub[f'{embedder}class_embedder.embedding_table.weight'] = state[
                'y_embedder.embedding_table.weight']
            hub[f'{theirs}norm1.linear.{end}'] = state[f'{ours}adaLN_modulation.1.{end}']
            for name, third in zip(('q', 'k', 'v'), np.split(state[f'{ours}attn.qkv.{end}'], 3), strict=True):
                hub[f'{theirs}attn1.to_{name}.{end}'] = third
            hub[f'{theirs}attn1.to_out.0.{end}'] = state[f'{ours}attn.proj.{end}']
            hub[f'{theirs}ff.net.0.proj.{end}'] = state[f'{ours}mlp.fc1.{end}']
            hub[f'{theirs}ff.net.2.{end}'] = state[f'{ours}mlp.fc2.{end}']
    return {key: value.copy() for key, value in hub.items()}


def hub_config(arch) -> dict:
    """config.json of a diffusers DiT folder."""
    heads = arch['mixer']['heads']
    return {'_class_name': 'DiTTransformer2DModel', 'num_attention_heads': heads,
            'in_channels': arch['channels'],
            'attention_head_dim': arch['width'] // heads, 'num_layers': arch['depth'],
            'patch_size': arch['patch'], 'sample_size': arch['input_size'][0],
            'num_embeds_ada_norm': arch['num_classes'], 'norm_eps': 1e-5}
