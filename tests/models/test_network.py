"""The functional face of the models: counts, checks, and the class a user calls."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax import recipes
from lit_jax.models import network as network_module
from lit_jax.models.arch import check_arch
from lit_jax.models.cost import format_parameters, network_macs
from lit_jax.models.macs import count_macs
from lit_jax.models.network import Model, Network, count_parameters
from lit_jax.runtime.errors import UserError

TINY = {'family': 'dit', 'depth': 2, 'width': 32, 'patch': 2, 'input_size': [8, 8], 'channels': 3,
        'num_classes': 3, 'mixer': {'name': 'softmax', 'heads': 2, 'qkv_bias': True}}


def network_of(size, mixer, image_size=256, patch=2, **options):
    config = recipes.size(recipes.default(), size, mixer)
    config.data.image_size, config.model.patch = image_size, patch
    config.model.mixer.update(options)
    return Network(recipes.architecture(config))


@pytest.mark.parametrize('size, count',
                         [('s', 32_963_360), ('b', 130_512_416), ('l', 458_102_816), ('xl', 675_129_632)])
def test_dit_has_the_published_number_of_parameters(size, count):
    assert count_parameters(network_of(size, 'softmax')) == count


def test_dit_xl_at_512_counts_the_larger_position_table():
    assert count_parameters(network_of('xl', 'softmax', image_size=512)) == 676_014_368


@pytest.mark.parametrize('size, plain, with_bias', [
    ('s', 33_009_440, 33_023_264), ('b', 130_564_640, 130_592_288), ('l', 458_188_832, 458_262_560),
    ('xl', 675_242_528, 675_339_296)])
def test_lit_has_the_number_of_parameters_of_its_table(size, plain, with_bias):
    assert count_parameters(network_of(size, 'linear')) == plain
    assert count_parameters(network_of(size, 'linear', qkv_bias=True)) == with_bias


@pytest.mark.parametrize('size, patch, image_size, gmacs', [
    ('s', 2, 256, 6.06), ('s', 4, 256, 1.41), ('s', 8, 256, 0.36), ('b', 2, 256, 23.01), ('b', 4, 256, 5.57),
    ('b', 8, 256, 1.42), ('l', 2, 256, 80.7), ('l', 4, 256, 19.7), ('l', 8, 256, 5.0), ('xl', 2, 256, 118.6),
    ('xl', 4, 256, 29.0), ('xl', 8, 256, 7.4), ('xl', 2, 512, 524.5)])
def test_dit_costs_the_published_multiply_accumulates(size, patch, image_size, gmacs):
    """Relative tolerance: the digits that the table prints."""
    assert network_macs(network_of(size, 'softmax', image_size,
                                   patch)) / 1e9 == pytest.approx(gmacs, rel=8e-3)


def test_macs_of_a_product_in_a_loop():
    def three_products(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]

    assert count_macs(three_products, jnp.ones((5, 5))) == 3 * 5 ** 3


def test_the_parameter_table_lists_every_leaf():
    network = Network(TINY)
    table = format_parameters(network)
    for path, _ in jax.tree_util.tree_leaves_with_path(network.abstract()):
        assert jax.tree_util.keystr(path, simple=True, separator='/') in table
    assert f'{count_parameters(network):,}' in table


def test_abstract_is_what_init_makes():
    network = Network(TINY)
    params = jax.jit(network.init)(jax.random.key(0))
    jax.tree.map(lambda leaf, spec: (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
                 or pytest.fail(str(spec)), params, network.abstract())


def test_model_broadcasts_scalars_and_checks_its_inputs():
    network = Network(TINY)
    model = Model(network, jax.jit(network.init)(jax.random.key(0)), {})
    assert model(np.zeros((2, 8, 8, 3)), 5, 1).shape == (2, 8, 8, 6)
    with pytest.raises(UserError, match='NHWC'):
        model(np.zeros((2, 3, 8, 8)), 5, 1)
    with pytest.raises(UserError, match=r'0\.\.3'):
        model(np.zeros((2, 8, 8, 3)), 5, 4)


@pytest.mark.parametrize('change, message', [
    ({'family': 'unet'}, 'unknown model family'), ({'depth': 0}, 'depth'),
    ({'patch': 3}, 'not divisible by patch'),
    ({'mixer': {'name': 'softmax', 'heads': 5}}, 'do not divide the width'), ({'colour': 1}, 'colour'),
    ({'mixer': {'name': 'fourier', 'heads': 2}}, 'fourier')])
def test_an_impossible_architecture_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        Network({**TINY, **change})


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match='num_classes'):
        check_arch({k: v for k, v in TINY.items() if k != 'num_classes'})


def test_compiling_for_inference_changes_no_value(monkeypatch):
    """Only the library of the matrix products differs: rounding of float32."""
    monkeypatch.setattr(network_module, 'LARGE_PRODUCT', 1)
    arch = {**TINY, 'mixer': {'name': 'linear', 'heads': 2}}
    network = Network(arch)
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, jax.jit(network.init)(jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    want = jax.jit(network.apply)(params, x, jnp.array([5, 6]), {'label': jnp.array([1, 2])})
    np.testing.assert_allclose(Model(network, params, {})(x, [5, 6], [1, 2]), want, rtol=2e-4, atol=2e-4)
    assert network_module.inference_options('softmax', 4096, 1152) == {}
