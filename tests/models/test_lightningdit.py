"""LightningDiT and REPA's q/k norm against their own code, and LiT attention that turns queries and keys."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights

from lit_jax.convert.torch_export import to_torch_state, torch_layout
from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.guidance import guide
from lit_jax.models.mixers.linear import EPS, linear_attention
from lit_jax.models.network import Network, count_parameters
from lit_jax.models.rotary import ROTARY, rotary_tables, rotate
from lit_jax.runtime.errors import UserError

CASES = 'lightningdit_a', 'lightningdit_b', 'lightningdit_c', 'repa_qknorm'
XL = {'family': 'dit', 'depth': 28, 'width': 1152, 'patch': 1, 'input_size': (16, 16), 'channels': 32,
      'num_classes': 1000, 'learn_sigma': False, 'ffn': 'swiglu_bias', 'norm': 'rms',
      'mixer': {'name': 'softmax', 'heads': 16, 'qkv_bias': True, 'rope': True}}


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def load(goldens, name):
    """(arch, float32 params, torch state with its buffers, meta, arrays in NHWC)."""
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    state = dict(state)
    for key, stored in zip(ROTARY, ('out_rope_cos', 'out_rope_sin'), strict=True):
        if stored in arrays:
            state[key] = arrays[stored]
    arch, params = from_torch_state(state, heads=meta['config']['heads'],
                                    input_size=(meta['config']['input'],) * 2)
    return arch, params, state, meta, {key: np.moveaxis(value, 1, -1) if value.ndim == 4 else value
                                       for key, value in arrays.items()}


@pytest.mark.parametrize('name', CASES)
def test_outputs_equal_the_official_models(name, goldens, monkeypatch):
    """In both precisions; guided channels 0 to 2, inside and outside of the interval. The stored tables
    were rounded by PyTorch's own cosine, which in float64 shows: there they are taken as they are."""
    arch, params, _, meta, arrays = load(goldens, name)
    channels = meta['config']['in_channels']
    for dtype, bound in ((jnp.float32, 2e-5), (jnp.float64, 1e-9)):
        if dtype == jnp.float64 and 'out_rope_cos' in arrays:
            stored = arrays['out_rope_cos'], arrays['out_rope_sin']
            monkeypatch.setattr('lit_jax.models.rotary.rotary_tables', lambda *_, stored=stored: stored)
        with jax.enable_x64(dtype == jnp.float64):
            network = Network(arch, dtype=dtype)
            own = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf, dtype), params)
            apply = jax.jit(network.apply)
            got = apply(own, np.asarray(arrays['in_x'], dtype), np.asarray(arrays['in_t'], dtype),
                        {'label': arrays['in_y']})[..., :channels]
            assert got.dtype == dtype and relative_error(got, arrays['out64_v']) <= bound
            if 'in_cfg_x' not in arrays or dtype == jnp.float32:
                continue
            half = len(arrays['in_cfg_x']) // 2
            x, t, y = (arrays[f'in_cfg_{part}'][:half] for part in ('x', 't', 'y'))
            for end, interval in (('', None), ('_interval_on', (float(t[0]) - 0.01, 1)),
                                  ('_interval_off', (float(t[0]) + 0.01, 1))):
                model = guide(lambda *inputs, own=own, apply=apply: apply(own, *inputs)[..., :channels], 6.7,
                              network.guidance_pair, 3, interval)
                guided = model(jnp.asarray(x, dtype), jnp.asarray(t, dtype), {'label': y})
                assert relative_error(guided, arrays[f'out64_cfg_6.7{end}'][:half]) <= bound, end


@pytest.mark.parametrize('name', CASES)
def test_files_there_and_back(name, goldens):
    """All tensors, buffers included; a table that is not this grid's is told."""
    arch, params, state, _, arrays = load(goldens, name)
    back = to_torch_state(params, arch)
    without = {key for key in state if not key.startswith('projectors.')}
    assert set(back) == without | {'pos_embed'} == set(torch_layout(arch))
    for key in without:
        np.testing.assert_allclose(back[key], state[key], rtol=0, atol=2e-7 if key in ROTARY else 0)
    if ROTARY[0] in state:
        state[ROTARY[0]] = state[ROTARY[0]] + 0.01
        with pytest.raises(UserError, match='feat_rope.freqs_cos is not the rotary table'):
            from_torch_state(state, heads=arch['mixer']['heads'], input_size=arch['input_size'])


@pytest.mark.parametrize('changes, count', [
    ({}, 675_256_736), ({'patch': 2}, 675_256_832),
    ({'depth': 12, 'width': 768, 'mixer': {**XL['mixer'], 'heads': 12}}, 130_556_192),
    ({'depth': 24, 'width': 1536, 'mixer': {**XL['mixer'], 'heads': 24}}, 1_029_401_120)])
def test_published_sizes(changes, count):
    network = Network({**XL, **changes})
    assert count_parameters(network) == count


def test_turned_queries_and_keys_know_their_distance():
    """q·k after turning depends on the distance of the tokens only, rows and columns apart."""
    rng = np.random.default_rng(0)
    grid, size = (4, 5), 8
    q, k = (np.broadcast_to(rng.standard_normal(size), (1, 20, 1, size)) for _ in range(2))
    with jax.enable_x64(True):
        turned_q, turned_k = (np.asarray(rotate(jnp.asarray(a), grid))[0, :, 0] for a in (q, k))
    products = turned_q @ turned_k.T
    np.testing.assert_allclose(products[0, 7], products[6, 13], rtol=1e-6)      # both one down, two right
    np.testing.assert_allclose(np.diag(products), products[0, 0], rtol=1e-6)
    assert abs(products[0, 1] - products[0, 5]) > 1e-3
    cosine, sine = rotary_tables(grid, size)
    assert cosine.shape == sine.shape == (20, size) and np.allclose(cosine ** 2 + sine ** 2, 1)


def test_linear_attention_turns_its_numerator_only():
    rng = np.random.default_rng(1)
    q, k, v = (np.abs(rng.standard_normal((2, 6, 2, 4))) for _ in range(3))
    with jax.enable_x64(True):
        turned_q, turned_k = (np.asarray(rotate(jnp.asarray(a), (2, 3))) for a in (q, k))
        got = linear_attention(*(jnp.asarray(a) for a in (q, k, v)), grid=(2, 3))
    weight = np.einsum('bnhe,bmhe->bhnm', turned_q, turned_k)
    total = np.einsum('bnhe,bmhe->bhnm', q, k).mean(-1) + EPS
    want = np.einsum('bhnm,bmhe->bnhe', weight, v) / 6 / np.swapaxes(total, 1, 2)[..., None]
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize('mixer, message', [
    ({'heads': 12, 'rope': True}, 'a multiple of 4 channels; 12 heads of width 24 have 2'),
    ({'heads': 2, 'rope': True, 'compress': 2}, 'take one of them'),
    ({'heads': 2, 'qk_norm': 'batch'}, "unknown mixer.qk_norm 'batch'")])
def test_what_does_not_go_together_is_told(mixer, message):
    arch = {**XL, 'depth': 1, 'width': 24, 'input_size': (4, 4), 'mixer': {'name': 'softmax', **mixer}}
    with pytest.raises(UserError, match=message):
        Network(arch)
    with pytest.raises(UserError, match="unknown model.norm 'batch'"):
        Network({**arch, 'norm': 'batch'})
