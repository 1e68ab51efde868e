"""The numbers about maps, against plain numpy and matrices whose rank is known."""
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.analysis.measures import (
    convolution_operator,
    effective_rank,
    head_similarity,
    numerical_rank,
    singular_values,
    spread,
)
from lit_jax.models.mixers.depthwise import depthwise_conv


def random_maps(heads, rows, keys, seed=0):
    maps = np.random.default_rng(seed).random((heads, rows, keys)) ** 4
    return (maps / maps.sum(-1, keepdims=True)).astype(np.float32)


def slow_similarity(maps):
    def mean(maps):
        return np.mean([np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
                        for a, b in itertools.combinations(maps, 2)])

    maps = maps.astype(np.float64)
    return mean(maps), mean(maps - 1 / maps.shape[-1])


@pytest.mark.parametrize('shape', [(2, 16, 16), (6, 9, 9), (3, 12, 4)])
def test_similarity_is_the_mean_cosine_of_all_pairs(shape):
    maps = random_maps(*shape)
    np.testing.assert_allclose(head_similarity(maps), slow_similarity(maps), rtol=2e-5)


def test_heads_that_are_equal_have_similarity_one_and_opposite_ones_less():
    one = random_maps(1, 8, 8)
    np.testing.assert_allclose(head_similarity(jnp.repeat(one, 3, axis=0)), (1, 1), rtol=1e-6)
    opposite = np.concatenate([one, 2 / 8 - one])
    cosine, centred = head_similarity(opposite)
    assert cosine < 1
    np.testing.assert_allclose(centred, -1, rtol=1e-5)


def test_heads_that_never_look_at_the_same_token_have_cosine_zero():
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, :, :2] = maps[1, :, 2:] = 0.5
    assert head_similarity(maps)[0] == 0


def test_a_uniform_map_has_no_direction_and_one_head_no_pair():
    maps = np.concatenate([random_maps(2, 6, 6), np.full((1, 6, 6), 1 / 6, np.float32)])
    np.testing.assert_allclose(head_similarity(maps)[1], slow_similarity(maps[:2])[1], rtol=1e-5)
    assert np.isnan(head_similarity(np.full((2, 6, 6), 1 / 6, np.float32))[1])
    assert np.isnan(head_similarity(random_maps(1, 6, 6))).all()


@pytest.mark.parametrize('values, rank', [
    (np.ones(7), 7), ([3, 0, 0, 0], 1), (np.full((2, 5), 0.2), [5, 5]), (np.zeros(4), 0),
    ([0.75, 0.25], np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))])
def test_the_effective_rank_of_known_singular_values(values, rank):
    np.testing.assert_allclose(effective_rank(values), rank, rtol=1e-12)


def test_ranks_of_known_matrices():
    rng = np.random.default_rng(1)
    uniform, identity = np.full((9, 9), 1 / 9), np.eye(9)
    product = rng.standard_normal((9, 3)) @ rng.standard_normal((3, 9))
    values = singular_values(np.stack([uniform, identity, product]))
    np.testing.assert_allclose(effective_rank(values)[:2], (1, 9), rtol=1e-6)
    assert 1 < effective_rank(values)[2] < 3
    assert numerical_rank(values, (9, 9)).tolist() == [1, 9, 3]
    assert numerical_rank(singular_values(product),
                          (9, 9)) == np.linalg.matrix_rank(product.astype(np.float32))


@pytest.mark.parametrize('grid, size', [((4, 4), 3), ((3, 6), 5), ((2, 2), 5)])
def test_the_operator_of_the_convolution_does_what_the_convolution_does(grid, size, x64):
    """The matrices on a grid of values give what the layer gives, without its bias."""
    rng = np.random.default_rng(2)
    kernel, values = rng.standard_normal((size, size, 1, 6)), rng.standard_normal((1, *grid, 1, 6))
    want = depthwise_conv(jnp.asarray(values), jnp.asarray(kernel), jnp.zeros(6))[0, :, :, 0].reshape(-1, 6)
    operators = convolution_operator(kernel, grid, [0, 3, 5])
    got = np.einsum('cnm,mc->nc', operators, values.reshape(-1, 6)[:, [0, 3, 5]])
    np.testing.assert_allclose(got, want[:, [0, 3, 5]], rtol=1e-10, atol=1e-12)


def test_the_convolution_restores_the_rank_that_few_features_cannot_have():
    """LiT §4.1: a map of rank E and a convolution together can be of full rank."""
    rng = np.random.default_rng(3)
    low = rng.random((16, 2)) @ rng.random((2, 16)) / 16
    both = low + convolution_operator(rng.uniform(-0.2, 0.2, (5, 5, 1, 1)), (4, 4), [0])
    assert numerical_rank(singular_values(low), (16, 16)) == 2
    assert numerical_rank(singular_values(both), (16, 16)) == 16
    assert effective_rank(singular_values(both)) > 4 * effective_rank(singular_values(low))


@pytest.mark.parametrize('count, most, want',
                         [(1000, 3, [0, 500, 999]), (4, 4, [0, 1, 2, 3]), (3, 8, [0, 1, 2]), (5, 1, [0])])
def test_spread_takes_both_ends(count, most, want):
    assert spread(count, most) == want
