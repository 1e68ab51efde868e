"""The PyTorch code that exports carry: the same outputs as lit_jax, for every mixer and family."""
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.convert.torch_export import to_torch_state
from lit_jax.convert.torch_student import MIXERS, modeling_source
from lit_jax.models.mixers import find_mixer
from lit_jax.models.network import Network
from lit_jax.runtime.leaves import named_leaves, unflatten

SIZES = {'depth': 2, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 4, 'learn_sigma': True,
         'mlp_ratio': 4.0, 'stages': ()}
CLASSES = {**SIZES, 'family': 'dit', 'num_classes': 5, 'ffn': 'mlp'}
DIG = {**{name: value for name, value in CLASSES.items() if name != 'stages'}, 'family': 'dig', 'ffn': 'swiglu',
       'order': 'official', 'local': 'identity', 'skip': 'none'}
PIXART = {**SIZES, 'family': 'pixart', 'ffn': 'mlp', 'cross_heads': 4, 'caption_channels': 20, 'caption_tokens': 7,
          'base_size': 4, 'pe_interpolation': 1.0}


def mixer(name, **options):
    return {'name': name, **find_mixer(name).defaults(), 'heads': 2, **options}


GLA = mixer('gla')
ARCHS = {
    'dit': {**CLASSES, 'mixer': mixer('softmax')},
    'compressed': {**CLASSES, 'mixer': mixer('softmax'), 'stages': ({'depth': 1}, {'depth': 1, 'mixer': {
        'compress': 2}})},
    'lit': {**CLASSES, 'mixer': mixer('linear')},
    'focused': {**CLASSES, 'mixer': mixer('linear', focus_power=3, focus_scale=True, key_grid=(4, 4))},
    'gelu, no convolution': {**CLASSES, 'learn_sigma': False, 'mixer': mixer('linear', activation='gelu',
                                                                             dwc_kernel=0, qkv_bias=True)},
    'hybrid': {**CLASSES, 'mixer': mixer('linear'), 'stages': ({'depth': 1}, {'depth': 1, 'mixer': mixer('softmax')})},
    'sana': {**CLASSES, 'mixer': mixer('sana'), 'ffn': 'mix'},
    'edit': {**CLASSES, 'mixer': mixer('edit'), 'input_size': (10, 8)},
    'moh': {**CLASSES, 'mixer': mixer('moh', heads=4, shared=2, routed=1)},
    'dydila': {**CLASSES, 'mixer': mixer('dydila'), 'ffn': 'mix'},
    'dydila maps': {**CLASSES, 'mixer': mixer('dydila', difference='maps', normaliser='weights', dwc='single',
                                              separate_banks=True)},
    'dig': {**DIG, 'depth': 5, 'mixer': GLA},
    'dig skip': {**DIG, 'depth': 6, 'skip': 'skip', 'order': 'algorithm1', 'mixer': GLA},
    'gla four': {**CLASSES, 'mixer': mixer('gla', directions='four', value_gate=True, norm='layer', gate_bias=True)},
    'udig': {**{k: v for k, v in DIG.items() if k != 'skip'}, 'family': 'udig', 'depth': 10, 'patch': 1, 'mixer': GLA},
    'pixart': {**PIXART, 'mixer': mixer('softmax')},
    'pixart lit': {**PIXART, 'mixer': mixer('linear')},
}


def weights(arch):
    rng = np.random.default_rng(0)
    shapes = named_leaves(Network(arch).abstract())

    def draw(path, leaf):
        fan = np.prod(leaf.shape[-2:]) ** 0.5 if 'kernel' in path or 'proj' in path else 4
        return rng.standard_normal(leaf.shape) / max(fan, 4) + ('gain' in path)
    return unflatten({path: draw(path, leaf).astype(np.float32) for path, leaf in shapes.items()})


def load_source(text, tmp_path):
    file = tmp_path / 'modeling_lit.py'
    file.write_text(text)
    spec = importlib.util.spec_from_file_location('modeling_lit', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.peers
@pytest.mark.parametrize('name', ARCHS)
def test_outputs_are_those_of_lit_jax(name, tmp_path):
    torch = pytest.importorskip('torch')
    network = Network(ARCHS[name], dtype='float64')
    arch, params = network.arch, weights(ARCHS[name])
    module = load_source(modeling_source(arch), tmp_path)
    model = module.MODELS[arch['family']](arch)
    state = {key: torch.from_numpy(value) for key, value in to_torch_state(params, arch).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {'y_embedder.y_embedding'}
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((2, *arch['input_size'], 4)), np.array([3, 977])
    if arch['family'] == 'pixart':
        text, mask = rng.standard_normal((2, 7, 20)), np.array([[1] * 7, [1] * 4 + [0] * 3])
        cond, inputs = {'text': jnp.asarray(text), 'text_mask': jnp.asarray(mask)}, (text, mask)
    else:
        label = np.array([1, 5])
        cond, inputs = {'label': jnp.asarray(label)}, (label,)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        cond = {key: jnp.asarray(value) for key, value in cond.items()}
        expected = np.asarray(jax.jit(network.apply)(wide, jnp.asarray(x), jnp.asarray(t), cond))
    with torch.no_grad():
        got = model.eval().double()(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t),
                                    *(torch.from_numpy(array) for array in inputs))
    got = got.permute(0, 2, 3, 1).numpy()
    assert np.abs(expected).max() > 0.1
    # The position table is stored in float32.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    with torch.no_grad():
        narrow = model.bfloat16()(torch.from_numpy(x).bfloat16().permute(0, 3, 1, 2), torch.from_numpy(t), *(
            torch.from_numpy(array).bfloat16() if array.dtype == np.float64 else torch.from_numpy(array)
            for array in inputs))
    assert narrow.dtype == torch.bfloat16 and torch.isfinite(narrow).all()


def test_every_mixer_has_its_code():
    assert set(MIXERS) >= {mixer['name'] for arch in ARCHS.values() for mixer in [arch['mixer']]}
