"""The sharding table on eight virtual devices."""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.runtime.errors import UserError
from lit_jax.training import setup
from lit_jax.training.mesh import BatchLayout, find_rule, format_shardings, make_mesh, state_shardings
from lit_jax.training.state import abstract_state

ROOT = Path(__file__).parents[2]
MIXED = {'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1}


def state_of(config):
    return abstract_state(setup.build_network(config), setup.build_optimizer(config))


def shardings_of(config, mesh=MIXED):
    return state_shardings(state_of(config), make_mesh(mesh), recipes.architecture(config))


@pytest.mark.parametrize('size', list(recipes.SIZES))
@pytest.mark.parametrize('mixer', ['softmax', 'linear'])
def test_every_leaf_of_every_size_has_a_rule_and_divides(size, mixer):
    config = recipes.size(recipes.default(), size, mixer)
    config.model.mixer.heads = 4      # LiT-B has 3 heads, which two tensor devices cannot share
    shardings = shardings_of(config)
    assert all(sharding.mesh.shape['fsdp'] == 2 for sharding in jax.tree.leaves(shardings))


def test_optimizer_and_ema_lie_like_their_parameters():
    shardings = shardings_of(recipes.size(recipes.default(), 's', 'linear'))
    moments = shardings['opt'][0]
    for tree in (shardings['ema'], moments.mu, moments.nu):
        assert jax.tree.map(lambda s: s.spec, tree) == jax.tree.map(lambda s: s.spec, shardings['params'])
    assert shardings['step'].spec == P()


def test_the_layer_axis_is_never_cut():
    shardings = shardings_of(recipes.size(recipes.default(), 's', 'softmax'))
    for sharding in jax.tree.leaves(shardings['params']['blocks']):
        assert not sharding.spec or sharding.spec[0] is None


def test_fsdp_cuts_nearly_all_bytes():
    """What stays whole on every device are biases and the convolution: under 1 % of LiT-S."""
    config = recipes.size(recipes.default(), 's', 'linear')
    abstract = state_of(config)
    shardings = shardings_of(config, {'data': 1, 'fsdp': 8, 'tensor': 1, 'seq': 1})
    pairs = list(zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True))
    total = sum(np.prod(leaf.shape) for leaf, _ in pairs)
    local = sum(np.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert local < 1.07 * total / 8


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(UserError, match='no sharding rule fits blocks/attn/mystery'):
        find_rule('blocks/attn/mystery', (2, 3))


def test_no_other_mixers_rule_is_taken():
    """The key of gla fits no linear attention; where nothing shards weights, what is not declared is
    copied."""
    arch = recipes.architecture(recipes.size(recipes.default(), 's', 'linear'))
    with pytest.raises(UserError, match=r"no sharding rule fits blocks/attn/key/kernel .*: 'linear' declares "
                                        r'no key/kernel \(gla declare.*mixers\.linear\.LinearAttention'):
        find_rule('blocks/attn/key/kernel', (2, 8, 2, 4), arch)
    assert find_rule('blocks/attn/key/kernel', (2, 8, 2, 4), arch, sharded=False) == P()
    stages = {**arch, 'stages': ({'depth': 6}, {'depth': 6, 'mixer': {'name': 'gla', 'heads': 6}})}
    assert find_rule('ema/blocks1/attn/key/kernel', (2, 8, 2, 4), stages) == P(None, 'fsdp', 'tensor', None)
    with pytest.raises(UserError, match='no sharding rule fits ema/blocks0/attn/key/kernel'):
        find_rule('ema/blocks0/attn/key/kernel', (2, 8, 2, 4), stages)


def test_an_axis_that_does_not_divide_is_an_error():
    leaf = {'blocks': {'attn': {'q': {'kernel': jax.ShapeDtypeStruct((2, 32, 3, 8), jnp.float32)}}}}
    with pytest.raises(UserError, match=r'3 is not divisible by mesh\.tensor = 2'):
        state_shardings(leaf, make_mesh(MIXED), recipes.architecture(tiny_recipe('linear')))


def test_a_mesh_of_another_size_than_the_machine_is_an_error():
    with pytest.raises(UserError, match='needs 4 devices, here are 8'):
        make_mesh({'data': 4, 'fsdp': 1, 'tensor': 1, 'seq': 1})


def test_the_table_lists_bytes_a_device():
    table = format_shardings({'params': state_of(tiny_recipe())['params']}, make_mesh(MIXED),
                             recipes.architecture(tiny_recipe()))
    assert 'params/blocks/mlp/fc1/kernel' in table and 'total, MB a device' in table


@pytest.mark.parametrize('name', ['lit_xl', 'dit_xl'])
def test_the_table_of_the_largest_models_is_the_one_that_was_read_and_approved(name, goldens):
    """A change of rules shows here line by line; to accept it: python tests/training/test_mesh.py"""
    assert sharding_table(name) == (goldens / f'shardings_{name}.txt').read_text()


def sharding_table(name):
    config = recipes.load_recipe(name)
    return format_shardings(state_of(config), make_mesh(MIXED), recipes.architecture(config)) + '\n'


def test_hosts_read_the_rows_of_their_devices():
    """The middle host of a mesh whose `seq` axis runs over hosts reads what its neighbour on that axis
    reads."""
    mesh = make_mesh({'data': 4, 'fsdp': 1, 'tensor': 1, 'seq': 2})
    layout = BatchLayout(mesh, 8)
    by_device = layout.sharding.devices_indices_map((8,))
    rows = [np.arange(8)[by_device[device]].tolist() for device in mesh.devices.flat]
    assert rows == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]


def test_a_batch_is_cut_over_data_and_fsdp():
    layout = BatchLayout(make_mesh(MIXED), 8)
    images = np.arange(8 * 16, dtype=np.float32).reshape(8, 4, 4, 1)
    placed = layout.place({'image': images})['image']
    assert layout.rows.tolist() == list(range(8))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4, 4, 1)}
    np.testing.assert_array_equal(placed, images)


if __name__ == '__main__':     # writes the golden tables; needs the eight devices of conftest
    for recipe in ('lit_xl', 'dit_xl'):
        (ROOT / 'tests' / 'goldens' / f'shardings_{recipe}.txt').write_text(sharding_table(recipe))
