"""Mixture-of-head attention against the official MoH-DiT, and what its weights must obey."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import made, normal
from flax import nnx
from goldens import weights
from tiers import BOTH_WIDTHS

from lit_jax.models.mixers import build_mixer
from lit_jax.models.network import Network
from lit_jax.models.probe import watching
from lit_jax.runtime.errors import UserError

GOLDEN = pytest.mark.parametrize('name', ['moh_mixed', 'moh_headdim'])


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def golden_mixers(path, dtype):
    """The attention of every block with the golden weights, and the arrays of the file."""
    meta, state, arrays = weights.load(path)
    case, mixers = meta['config'], []
    for i in range(case['depth']):
        torch = {k.removeprefix(f'blocks.{i}.attn.'): v for k, v in state.items() if f'blocks.{i}.attn.' in k}
        options = {'heads': case['heads'][i], 'shared': case['shared'][i], 'routed': case['routed'][i]}
        if case['head_dim'][i]:
            options['head_dim'] = case['head_dim'][i]
        mixer = nnx.eval_shape(lambda options=options: build_mixer(
            {'name': 'moh', **options}, case['width'], dtype=dtype, rngs=nnx.Rngs(0)))
        head = (options['heads'], options.get('head_dim') or case['width'] // options['heads'])
        params = {'qkv': {'kernel': torch['qkv.weight'].T.reshape(-1, 3, *head),
                          'bias': torch['qkv.bias'].reshape(3, *head)},
                  'proj': {'kernel': torch['proj.weight'].T.reshape(*head, -1), 'bias': torch['proj.bias']}}
        routers = {'wg': 'router', 'wg_1': 'shared_router', 'wg_0': 'kinds_router'}
        params |= {ours: {'kernel': torch[f'{theirs}.weight'].T} for theirs, ours in routers.items()
                   if f'{theirs}.weight' in torch}
        assert jax.tree.structure(params) == jax.tree.structure(nnx.to_pure_dict(nnx.state(mixer)))
        mixers.append(nnx.merge(nnx.split(mixer)[0], params))
    return mixers, arrays


def run(mixer, x):
    with watching('balance') as seen:
        y = mixer(x, (1, x.shape[1]))
    return y, seen['balance']


@BOTH_WIDTHS
@GOLDEN
def test_output_and_balance_loss_are_the_official_ones(name, wide, goldens):
    """Layers that do not route have no loss, in the official list as here."""
    with jax.enable_x64(wide):
        dtype, tolerance = (jnp.float64, 1e-9) if wide else (jnp.float32, 2e-5)
        mixers, arrays = golden_mixers(goldens / f'{name}.npz', dtype)
        losses = []
        for i, mixer in enumerate(mixers):
            x = np.asarray(arrays[f'mid_block{i}_attn_in'], dtype)
            y, balance = jax.jit(lambda x, mixer=mixer: run(mixer, x))(x)
            assert relative(y, arrays[f'mid_block{i}_attn_out']) <= tolerance
            losses += balance
        assert relative(losses, arrays['out64_aux_losses']) <= tolerance


@pytest.mark.parametrize('shared, routed', [(3, 2), (1, 2), (0, 3), (6, 0), (5, 1)])
def test_weights_of_the_heads_in_use_sum_to_their_number(shared, routed):
    """One shared head too, at which the official code stops."""
    mixer = made(lambda: build_mixer({'name': 'moh', 'heads': 6, 'shared': shared, 'routed': routed}, 24,
                                     dtype=jnp.float32, rngs=nnx.Rngs(0)))
    weights = np.asarray(jax.jit(mixer.head_weights)(normal(0, (2, 9, 24))))
    assert ((weights[..., shared:] > 0).sum(-1) == routed).all() and (weights[..., :shared] > 0).all()
    if not (shared and routed):
        np.testing.assert_allclose(weights.sum(-1), shared + routed, rtol=1e-5)
    else:      # the two kinds share 2 between them
        np.testing.assert_allclose(weights[..., :shared].sum(-1) / shared +
                                   weights[..., shared:].sum(-1) / routed, 2, rtol=1e-5)


def test_balance_loss_is_least_when_all_heads_are_chosen_equally():
    """E²·mean(p·mask): the routed heads' number where all are equal, E where one takes everything (routed
    1)."""
    graphdef, params = nnx.split(made(
        lambda: build_mixer({'name': 'moh', 'heads': 4, 'shared': 0, 'routed': 1}, 4, dtype=jnp.float32,
                            rngs=nnx.Rngs(0))))
    balance = jax.jit(lambda params: run(nnx.merge(graphdef, params), 50 * jnp.eye(4)[None])[1][0])
    for router, least in ((np.eye(4), 1), (np.eye(4)[[2] * 4], 4)):
        params['router']['kernel'][...] = jnp.asarray(router, jnp.float32)
        np.testing.assert_allclose(balance(params), least, rtol=1e-5)


def test_every_router_learns_from_the_output():
    graphdef, params = nnx.split(made(
        lambda: build_mixer({'name': 'moh', 'heads': 6, 'shared': 3, 'routed': 2}, 24, dtype=jnp.float32,
                            rngs=nnx.Rngs(0))))
    x = normal(0, (2, 9, 24))
    gradient = nnx.to_pure_dict(
        jax.jit(jax.grad(lambda params: jnp.sin(nnx.merge(graphdef, params)(x, (3, 3))).sum()))(params))
    for name in ('router', 'shared_router', 'kinds_router'):
        assert np.isfinite(gradient[name]['kernel']).all() and np.abs(gradient[name]['kernel']).max() > 1e-4


def test_a_model_shows_the_loss_of_its_routing_layers_only():
    """The mean over what is shown is then the official average over the layers that route."""
    network = Network({'family': 'dit', 'depth': 5, 'width': 16, 'patch': 2, 'input_size': [8, 8],
                       'channels': 4,
                       'num_classes': 3, 'mixer': {'name': 'moh', 'heads': 4, 'shared': 4, 'routed': 0},
                       'stages': [{'depth': 3},
                                  {'depth': 2, 'mixer': {'heads': 6, 'shared': 3, 'routed': 2,
                                                         'head_dim': 8}}]})
    assert network.losses == ('balance',)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), network.abstract())
    assert params['blocks1']['attn']['qkv']['kernel'].shape == (2, 16, 3, 6, 8)
    x = normal(1, (2, 8, 8, 4))
    _, seen = jax.jit(lambda *args: network.observe(*args, network.losses))(
        params, x, jnp.array([1, 700]), {'label': jnp.array([0, 3])})
    assert [values.shape for values in seen['balance']] == [(2,)]


@pytest.mark.parametrize('options, says', [
    ({'heads': 4, 'shared': 2, 'routed': 3}, 'leaves 2 to choose from: mixer.routed must be 1 to 2, got 3'),
    ({'heads': 4, 'shared': 2, 'routed': 0}, 'must be 1 to 2, got 0'),
    ({'heads': 4, 'shared': 4, 'routed': 1}, 'must be 0, got 1'),
    ({'heads': 4, 'shared': 5, 'routed': 0}, '5 is more than the 4 heads'),
    ({'heads': 4, 'shared': 2.0, 'routed': 1}, 'numbers of heads'),
    ({'heads': 4, 'routed': 1}, 'needs shared'),
])
def test_wrong_numbers_of_heads_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        build_mixer({'name': 'moh', **options}, 16, dtype=jnp.float32, rngs=nnx.Rngs(0))
