"""SiT and REPA against their own code: outputs, guidance, losses with gradients, and loops step by step."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import load_nhwc, relative_error, to_torch_float64

from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import Network, count_parameters

CASES = [('sit_a', Flow()), ('sit_p4', Flow()), ('repa_a', Flow(noise_at=1))]


def load(goldens, name, dtype):
    """(network, params, meta, arrays)."""
    meta, state, arrays = load_nhwc(goldens / f'{name}.npz')
    arch, params = from_torch_state(state, heads=meta['config']['heads'],
                                    input_size=(meta['config']['input'],) * 2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
    return Network(arch, dtype=dtype), params, meta, arrays


def velocity_of(network, params, channels=4):
    """(x, t, cond) -> the channels that the official forward returns."""
    apply = jax.jit(network.apply)
    return lambda x, t, cond: apply(params, x, t, cond)[..., :channels]


@pytest.mark.parametrize('dtype, bound', [(jnp.float32, 2e-5), (jnp.float64, 1e-9)])
@pytest.mark.parametrize('name, flow', CASES)
def test_outputs_equal_the_official_models(name, flow, dtype, bound, goldens):
    with jax.enable_x64(dtype == jnp.float64):
        network, params, _, arrays = load(goldens, name, dtype)
        model = velocity_of(network, params)
        got = model(np.asarray(arrays['in_x'], dtype), np.asarray(arrays['in_t'], dtype),
                    {'label': arrays['in_y']})
        assert got.dtype == dtype and relative_error(got, arrays['out64_v']) <= bound
        if 'in_cfg_x' not in arrays:
            return
        half = len(arrays['in_cfg_x']) // 2      # SiT ignores the other half
        x, t, y = (arrays[f'in_cfg_{part}'][:half] for part in ('x', 't', 'y'))
        guided = guide(model, 4.0, network.guidance_pair)(x.astype(dtype), t.astype(dtype), {'label': y})
        assert relative_error(guided, arrays['out64_cfg_4.0'][:half]) <= bound


def test_loops_of_sit_step_by_step(goldens, x64):
    network, params, meta, arrays = load(goldens, 'sit_p4', jnp.float64)
    case, half = meta['case'], len(arrays['in_loop_z']) // 2
    model = guide(lambda x, t, cond: network.apply(params, x, t, cond), case['cfg'], network.guidance_pair)
    z, cond = jnp.asarray(arrays['in_loop_z'][:half], jnp.float64), {'label': arrays['in_loop_y'][:half]}
    noise = jnp.asarray(arrays['in_loop_noise'][:, :half], jnp.float64)
    for name, settings, more in (
            ('ode', SamplerSettings('euler', case['loop'] - 1), {}),
            ('sde', SamplerSettings('sde', case['loop']), {'noise': jnp.concatenate([noise, noise[:1]])})):
        run = Flow().sampler(settings)
        states = jax.jit(lambda z, run=run, more=more: run(model, z, cond, trajectory=True, **more))(z)
        official = arrays[f'out64_{name}_loop'][name == 'ode':, :half]
        assert max(map(relative_error, states, official)) <= 1e-9, name


def test_the_loop_of_repa(goldens, x64):
    network, params, meta, arrays = load(goldens, 'repa_a', jnp.float64)
    case, flow = meta['case'], Flow(noise_at=1)
    model = guide(lambda x, t, cond: network.apply(params, x, t, cond), case['cfg'], network.guidance_pair,
                  'all', flow.guided_times((case['low'], case['high'])))
    run = flow.sampler(SamplerSettings('euler', case['loop']))
    end = jax.jit(lambda z: run(model, z, {'label': jnp.asarray(arrays['in_loop_y'])}))(
        jnp.asarray(arrays['in_loop_z'], jnp.float64))
    assert relative_error(end, arrays['out64_euler_loop_end']) <= 1e-9


def test_the_loss_of_sit_and_its_gradients(goldens, x64):
    """No loss touches the second half of the outputs."""
    network, params, meta, arrays = load(goldens, 'sit_p4', jnp.float64)
    x1, x0, t = (jnp.asarray(arrays[f'in_train_{name}'], jnp.float64) for name in ('x1', 'x0', 'u'))
    flow = Flow()
    x_t = flow.add_noise(x1, t, x0)

    def loss(params):
        output = network.apply(params, x_t, t, {'label': jnp.asarray(arrays['in_train_y'])})
        each = flow.losses(output, x1, x_t, t, x0)['mse']
        return each.mean(), each

    grads, each = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(each, arrays['out64_train_loss']) <= 1e-9
    torch = to_torch_float64(grads, network.arch)
    norms = [np.linalg.norm(torch[key]) for key in meta['grad_norm_keys']]
    np.testing.assert_allclose(norms, arrays['out64_train_grad_norms'], rtol=1e-9)
    unused = np.arange(len(torch['final_layer.linear.bias'])) % 8 >= 4
    assert not torch['final_layer.linear.weight'][unused].any()
    for key in ('final_layer.linear.weight', 't_embedder.mlp.2.bias'):
        assert relative_error(torch[key], arrays[f'out64_train_grad_{key}']) <= 1e-9


@pytest.mark.parametrize('depth, width, heads, learn_sigma, count', [
    (12, 384, 6, True, 32_963_360), (12, 768, 12, True, 130_512_416), (24, 1024, 16, True, 458_102_816),
    (28, 1152, 16, True, 675_129_632), (28, 1152, 16, False, 675_111_184)])
def test_published_sizes(depth, width, heads, learn_sigma, count):
    network = Network({'family': 'dit', 'depth': depth, 'width': width, 'patch': 2, 'input_size': (32, 32),
                       'channels': 4, 'num_classes': 1000, 'learn_sigma': learn_sigma,
                       'mixer': {'name': 'softmax', 'heads': heads, 'qkv_bias': True}})
    assert count_parameters(network) == count
