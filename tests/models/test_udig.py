"""U-DiG: shapes, errors, and that every part of the U is used."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, random_tree

from lit_jax.models.arch import mixing_layers
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh, state_shardings

TINY = {'family': 'udig', 'depth': 5, 'width': 16, 'patch': 1, 'input_size': (4, 8), 'channels': 3,
        'num_classes': 3, 'mixer': {'name': 'gla', 'heads': 2}}


def random_params(network, seed=0):
    return random_tree(network.abstract(), seed, 0.2)


def arguments(batch=2):
    return (normal(1, (batch, 4, 8, 3)), jnp.arange(batch) * 100,
            {'label': jnp.arange(batch) % 4})


@pytest.mark.slow
def test_every_parameter_is_used_and_the_output_has_twice_the_channels():
    network = Network(TINY)
    params = random_params(network)
    y, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.sin(network.apply(p, *arguments())).sum()))(params)
    assert jax.eval_shape(network.apply, params, *arguments()).shape == (2, 4, 8, 6)
    assert np.isfinite(y) and all(np.isfinite(g).all() and np.abs(g).max() > 0
                                  for g in jax.tree.leaves(gradient))


def test_five_groups_on_three_grids():
    shapes = jax.tree.map(lambda leaf: leaf.shape, Network({**TINY, 'depth': 10}).abstract())
    assert [shapes[f'blocks{i}']['dwc']['bias']
            for i in range(1, 6)] == [(2, 16), (2, 32), (2, 64), (2, 32), (2, 16)]
    assert shapes['joins5']['kernel'] == (2, 32, 16) and shapes['joins4']['kernel'] == (2, 64, 32)
    assert [(width, grid, mixer['heads']) for _, mixer, width, grid in mixing_layers(Network(TINY).arch)] == [
        (16, (4, 8), 2), (32, (2, 4), 4), (64, (1, 2), 8), (32, (2, 4), 4), (16, (4, 8), 2)]


@pytest.mark.slow
def test_a_decoder_block_sees_the_encoder_block_that_mirrors_it_in_its_own_place():
    """Blocks that do nothing and Linears that take only the skip: the last one brings the first block's
    tokens back."""
    network = Network({**TINY, 'depth': 10})
    apply = jax.jit(network.apply)
    params = jax.jit(network.init)(jax.random.key(0))
    params['joins5']['kernel'] = params['joins5']['kernel'].at[:].set(
        jnp.concatenate([jnp.zeros((16, 16)), jnp.eye(16)]))
    params['final_layer']['linear']['kernel'] = normal(2, (16, 6))
    x, t, label = arguments()
    y = apply(params, x, t, label)
    moved = apply(params, x.at[:, 1, 5].add(1), t, label) - y
    assert np.abs(moved[:, 1, 5]).min() > 0       # gates are zero: nothing else can reach another token
    assert np.abs(moved).sum() == pytest.approx(np.abs(moved[:, 1, 5]).sum())


@pytest.mark.slow
def test_a_scan_over_layers_changes_nothing():
    arch = {**TINY, 'depth': 25}
    params = random_params(Network(arch))
    want, got = (jax.jit(Network(arch, scan_layers=scan).apply)(params, *arguments())
                 for scan in (False, True))
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.slow
def test_cut_over_devices_it_is_the_same():
    network, mesh = Network(TINY), make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1})
    params = random_params(network)
    want = jax.jit(network.apply)(params, *arguments(4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(network.abstract(), mesh, network.arch))
        got = jax.jit(network.apply)(placed, *arguments(4))
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize('change, says', [
    ({'depth': 12}, 'model.depth 12 is not divisible by 5'),
    ({'input_size': (4, 6)}, '4 x 6 tokens are no multiples of 4'),
    ({'skip': 'skip'}, 'unknown fields skip'),
    ({'mixer': {'name': 'linear', 'heads': 2}}, 'has the mixer gla')])
def test_what_cannot_be_is_explained(change, says):
    with pytest.raises(UserError, match=says):
        Network({**TINY, **change})
