"""REPA's loss: its own code's values and gradients, and a recipe whose student learns a small network's."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import load_nhwc, relative_error, to_torch_float64
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.alignment import projection_loss
from lit_jax.diffusion.flow import Flow
from lit_jax.models.layers import BLOCK_OUTPUT
from lit_jax.models.network import Network, count_parameters
from lit_jax.runtime.errors import UserError
from lit_jax.training import setup
from lit_jax.training.frozen_features import read_features
from lit_jax.training.state import new_state

HERE = __name__
B = {'family': 'dit', 'depth': 12, 'width': 768, 'patch': 2, 'input_size': (32, 32), 'channels': 4,
     'num_classes': 1000, 'learn_sigma': False, 'mixer': {'name': 'softmax', 'heads': 12, 'qkv_bias': True},
     'projectors': {'block': 8, 'width': 2048, 'features': (768,)}}


def load_repa(goldens):
    """(network, params with projectors, meta, arrays), float64."""
    meta, state, arrays = load_nhwc(goldens / 'repa_a.npz')
    case = meta['case']
    arch, params = from_torch_state({key: value for key, value in state.items() if 'projectors' not in key},
                                    heads=case['heads'], input_size=(case['input'],) * 2)
    arch['projectors'] = {'block': case['encoder_depth'], 'width': case['projector_dim'],
                          'features': case['z_dims']}
    params['projectors'] = {f'p{i}': {f'fc{layer}': {
        'kernel': state[f'projectors.{i}.{layer}.weight'].T, 'bias': state[f'projectors.{i}.{layer}.bias']}
        for layer in (0, 2, 4)} for i in range(2)}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return Network(arch, dtype=jnp.float64), params, meta, arrays


def test_loss_and_gradients_equal_the_official_code(goldens, x64):
    network, params, meta, arrays = load_repa(goldens)
    block, flow = network.arch['projectors']['block'], Flow(noise_at=1)
    clean, noise, t = (jnp.asarray(arrays[f'in_train_{name}'], jnp.float64)
                       for name in ('images', 'noise', 't'))
    t = t.reshape(-1)
    features = [jnp.asarray(arrays[f'in_train_z{i}'], jnp.float64) for i in range(2)]

    def loss(params):
        x_t, label = flow.add_noise(clean, t, noise), jnp.asarray(arrays['in_train_y'])
        output, seen = network.observe(params, x_t, t, {'label': label}, (BLOCK_OUTPUT,))
        projected = network.project(params, jnp.concatenate(seen[BLOCK_OUTPUT])[block - 1])
        each = flow.losses(output, clean, x_t, t, noise)['mse'], projection_loss(projected, features)
        return each[0].mean() + 0.5 * each[1].mean(), each

    grads, (denoising, projection) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(denoising, arrays['out64_linear_denoising_loss']) <= 1e-9
    assert relative_error(projection.mean(), arrays['out64_linear_proj_loss']) <= 1e-9
    torch = to_torch_float64(grads, network.arch)
    norms = [np.linalg.norm(torch[key]) for key in meta['grad_norm_keys']]
    np.testing.assert_allclose(norms, arrays['out64_train_grad_norms'], rtol=1e-8)
    assert relative_error(torch['projectors.0.4.bias'],
                          arrays['out64_train_grad_projectors.0.4.bias']) <= 1e-9


def test_the_published_size():
    assert count_parameters(Network(B)) == 137_845_008


def small():
    """A network of two linear maps, from patches of 2 x 2 pixels."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, size)).astype(np.float32) for name, size in (('a', 6), ('b', 3))}

    def apply(params, images):
        patches = images[..., 0].reshape(len(images), 4, 2, 4, 2).swapaxes(2, 3).reshape(len(images), 16, 4)
        return [jnp.tanh(patches @ params[name]) for name in 'ab']

    return weights, apply


def no_network():
    return 3


def recipe(features=f'{HERE}:small', channels=(6, 3)):
    config = recipes.flow(tiny_recipe('linear'), noise_at=1)
    config.unlock()
    config.model.projectors = {'block': 1, 'width': 5, 'features': channels}
    config.train.features, config.train.features_weight = features, 0.25
    return config


@pytest.mark.slow
def test_a_student_learns_the_features_of_a_frozen_network():
    config = recipe()
    network, optimizer = setup.build_network(config), setup.build_optimizer(config)
    params = jax.jit(network.init)(jax.random.key(0))
    state = jax.jit(lambda params: new_state(params, optimizer))(params)
    from lit_jax.training.step import make_train_step
    step = jax.jit(make_train_step(network, optimizer, setup.build_objective(config)))
    rng = np.random.default_rng(1)
    batch = {'image': rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32), 'label': np.arange(8) % 3}
    frozen, seen = {'features': read_features(config).params}, []
    for _ in range(40):
        state, metrics = step(state, frozen, batch, jax.random.key(2))
        seen.append(float(metrics['loss/features']))
        want = metrics['loss/mse'] + 0.25 * metrics['loss/features']
        np.testing.assert_allclose(metrics['loss/total'], want, rtol=1e-5)
    assert -1 <= seen[-1] < seen[0] - 0.1


@pytest.mark.parametrize('change, message', [
    ({'features': ''}, 'model.projectors is given without train.features'),
    ({'features': f'{HERE}:no_network'}, r'must return \(parameters, function\), got 3'),
    ({'features': 'nowhere:network'}, 'cannot be imported')])
def test_what_is_no_network_is_told(change, message):
    with pytest.raises(UserError, match=message):
        read_features(recipe(**change))


def test_features_that_do_not_fit_are_told():
    z = jnp.ones((2, 16, 6))
    np.testing.assert_allclose(projection_loss([z], [3 * z]), [-1, -1], rtol=1e-6)
    with pytest.raises(UserError, match=r'projectors give \[\[2, 16, 6\]\], .* \[\[2, 9, 6\]\]'):
        projection_loss([z], [jnp.ones((2, 9, 6))])
    for wrong in ({'block': 13}, {'features': ()}, {'width': 0}, {'depth': 3}):
        with pytest.raises(UserError, match=r'model\.projectors'):
            Network({**B, 'projectors': {**B['projectors'], **wrong}})
