"""Losses, posteriors and their gradients against the official code, and what holds for any input."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import TAGS, load_nhwc, relative_error, tiny_dit, to_torch_float64, toy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.diffusion.objective import (
    learned_log_variance,
    p_mean_variance,
    per_quarter,
    predict_noise,
    predict_x0,
    q_sample,
    split_output,
    training_losses,
)
from lit_jax.diffusion.schedule import make_schedule
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError

SCHEDULE = make_schedule()
PRECISION = [(jnp.float32, 2e-5), (jnp.float64, 1e-9)]   # the project's parity bounds
shared = settings(deadline=None, max_examples=30)   # the first example compiles


def parts_of_one_step(arrays, respacing, tag, dtype):
    """Every quantity of one step of diffusion_toy, under the names of the golden file."""
    schedule = make_schedule(1000, respacing)

    def compute(x, noise, t):
        output = toy_model(x, jnp.asarray(schedule.timestep_map)[t], {})
        free, clipped = (p_mean_variance(schedule, output, x, t, clip_denoised=clip)
                         for clip in (False, True))
        return {'model': output, 'q_sample': q_sample(schedule, x, t, noise), 'mean': free.mean,
                'variance': free.variance, 'log_variance': free.log_variance, 'pred_xstart': free.x0,
                'clip_mean': clipped.mean, 'clip_pred_xstart': clipped.x0}

    # In float32 operation by operation: compiled without optimization, x0 at the last timesteps, a difference
    # of large numbers, is 2.2e-5 off.
    compute = jax.jit(compute) if dtype == jnp.float64 else compute
    return compute(arrays['in_x'].astype(dtype), arrays['in_noise'].astype(dtype),
                   arrays[f'in_t_{tag}'].astype(np.int32))


@pytest.mark.parametrize('dtype, bound', PRECISION)
@pytest.mark.parametrize('respacing, tag', TAGS.items())
def test_posterior_equals_the_official_one(respacing, tag, dtype, bound, goldens):
    _, _, arrays = load_nhwc(goldens / 'diffusion_toy.npz')
    with jax.enable_x64(dtype == jnp.float64):
        got = parts_of_one_step(arrays, respacing, tag, dtype)
    for name, value in got.items():
        want = arrays[f'out64_{tag}_{name}']
        assert value.dtype == dtype and value.shape == want.shape, name
        assert relative_error(value, want) <= bound, name
    # Variances span orders of magnitude, so each is held to its own size.
    np.testing.assert_allclose(got['variance'], arrays[f'out64_{tag}_variance'], rtol=min(bound, 1e-5),
                               atol=0)


@pytest.mark.parametrize('dtype, bound', PRECISION)
def test_losses_and_their_gradient_equal_the_official_ones(dtype, bound, goldens):
    """t = 0, where vb is a likelihood, is among the steps; the gradient shows what the stop_gradient keeps
    out."""
    _, _, arrays = load_nhwc(goldens / 'diffusion_toy.npz')

    @jax.jit
    def compute(x0, noise, t):
        x_t = q_sample(SCHEDULE, x0, t, noise)

        def total(output):
            losses = training_losses(SCHEDULE, output, x0, x_t, t, noise)
            return losses['mse'].mean() + losses['vb'].mean(), losses

        return jax.grad(total, has_aux=True)(toy_model(x_t, t, {}))

    with jax.enable_x64(dtype == jnp.float64):
        gradient, got = compute(arrays['in_x_start'].astype(dtype), arrays['in_train_noise'].astype(dtype),
                                arrays['in_train_t'].astype(np.int32))
        got = {name: np.asarray(value) for name, value in got.items()}
    for value, name in ((got['mse'], 'mse'), (got['vb'], 'vb'), (got['mse'] + got['vb'], 'loss'),
                        (gradient, 'grad_of_mean_loss_by_output')):
        assert value.dtype == dtype, name
        assert relative_error(value, arrays[f'out64_train_{name}']) <= bound, name


@pytest.mark.parametrize('dtype, bound', PRECISION)
def test_a_whole_model_has_the_official_losses_and_gradients(dtype, bound, goldens):
    meta, arrays, arch, params = tiny_dit(goldens)
    with jax.enable_x64(dtype == jnp.float64):
        losses, gradients = loss_and_gradients(arrays, arch, params, dtype)
    for name in ('mse', 'vb'):
        assert losses[name].dtype == dtype
        assert relative_error(losses[name], arrays[f'out64_train_{name}']) <= bound, name
    gradients = to_torch_float64(gradients, arch)
    norms = [np.linalg.norm(gradients[key]) for key in meta['grad_norm_keys']]
    np.testing.assert_allclose(norms, arrays['out64_train_grad_norms'], rtol=bound, atol=0)
    full = [key for key in gradients if f'out64_train_grad_{key}' in arrays]
    assert len(full) == 6
    for key in full:
        assert relative_error(gradients[key], arrays[f'out64_train_grad_{key}']) <= bound, key


def loss_and_gradients(arrays, arch, params, dtype):
    """(losses, gradients of their mean by the parameters) of the training batch of diffusion_dit."""
    network = Network(arch, dtype=dtype)
    x0, noise = arrays['in_x_start'].astype(dtype), arrays['in_train_noise'].astype(dtype)
    t, y = arrays['in_train_t'].astype(np.int32), arrays['in_train_y'].astype(np.int32)

    def loss(params, x0, noise, t, y):
        x_t = q_sample(SCHEDULE, x0, t, noise)
        losses = training_losses(SCHEDULE, network.apply(params, x_t, t, {'label': y}), x0, x_t, t, noise)
        return (losses['mse'] + losses['vb']).mean(), losses

    params = jax.tree.map(lambda p: p.astype(dtype), params)
    gradients, losses = jax.jit(jax.grad(loss, has_aux=True))(params, x0, noise, t, y)
    return losses, gradients


def random_batch(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x0, noise = rng.uniform(-1, 1, (4, 3, 3, 2)).astype(dtype), rng.normal(size=(4, 3, 3, 2)).astype(dtype)
    t = rng.integers(0, 1000, 4).astype(np.int32)
    output = rng.normal(size=(4, 3, 3, 4)).astype(dtype)
    return x0, noise, t, output


@shared
@given(st.integers(0, 2 ** 32 - 1))
def test_x0_and_noise_are_found_again(seed):
    """At t = 999 √ᾱ is 0.0064, so float64 shows what float32 would lose: 1e-16 times 157, and margin."""
    with jax.enable_x64(True):
        x0, noise, t, _ = random_batch(seed, np.float64)
        x_t = q_sample(SCHEDULE, x0, t, noise)
        np.testing.assert_allclose(predict_x0(SCHEDULE, x_t, t, noise), x0, atol=1e-12)
        np.testing.assert_allclose(predict_noise(SCHEDULE, x_t, t, x0), noise, atol=1e-12)


@shared
@given(st.integers(0, 2 ** 32 - 1))
def test_the_bound_trains_the_variance_alone(seed):
    x0, noise, t, output = random_batch(seed)
    t = np.append(np.int32(0), t[1:])
    mse, vb = (np.asarray(g) for g in gradients_by_output(x0, q_sample(SCHEDULE, x0, t, noise), t, noise,
                                                          output))
    assert (vb[..., :2] == 0).all() and (vb[..., 2:] != 0).any()
    assert (mse[..., 2:] == 0).all() and (mse[..., :2] != 0).any()


@jax.jit
def gradients_by_output(x0, x_t, t, noise, output):
    def total(output, name):
        return training_losses(SCHEDULE, output, x0, x_t, t, noise)[name].sum()

    return jax.grad(total)(output, 'mse'), jax.grad(total)(output, 'vb')


def test_a_perfect_model_has_no_loss_but_the_likelihood_of_pixels():
    """True noise and v = -1 give the true posterior. atol: the KL is a difference of numbers of order 1 in
    float32."""
    x0, noise, t, _ = random_batch(3)
    x_t = q_sample(SCHEDULE, x0, t, noise)
    output = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)
    losses = training_losses(SCHEDULE, output, x0, x_t, t, noise)
    assert (losses['mse'] == 0).all()
    np.testing.assert_allclose(losses['vb'], 0, atol=2e-5)


@pytest.mark.parametrize('v, table', [(-1, 'posterior_log_variance'), (1, 'log_betas')])
def test_the_ends_of_the_learned_range(v, table):
    t = jnp.array([0, 1, 999])
    got = learned_log_variance(SCHEDULE, jnp.full((3, 1, 1, 1), v, jnp.float32), t)
    np.testing.assert_allclose(got.ravel(), getattr(SCHEDULE, table)[t], rtol=1e-6)


def test_bfloat16_outputs_are_judged_in_float32():
    x0, noise, t, output = random_batch(5)
    x_t = q_sample(SCHEDULE, x0, t, noise)
    rough = output.astype(jnp.bfloat16)
    got = training_losses(SCHEDULE, rough, x0, x_t, t, noise)
    want = training_losses(SCHEDULE, rough.astype(jnp.float32), x0, x_t, t, noise)
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], want[name])


def test_a_model_without_variance_channels():
    """The noise error alone; the steps have the variance β, and the posterior's in the last, as in DiT."""
    schedule = make_schedule(1000, '20')
    rng = np.random.default_rng(0)
    output, x0, x, noise = (jnp.asarray(rng.normal(size=(20, 2, 2, 4)), jnp.float32) for _ in range(4))
    t = jnp.arange(20)
    whole = jnp.concatenate([output, output], axis=-1)
    losses = training_losses(schedule, output, x0, x, t, noise)
    assert set(losses) == {'mse'}
    with_variance = training_losses(schedule, whole, x0, x, t, noise)
    np.testing.assert_array_equal(losses['mse'], with_variance['mse'])
    got, want = p_mean_variance(schedule, output, x, t), p_mean_variance(schedule, whole, x, t)
    np.testing.assert_array_equal(got.mean, want.mean)
    first = schedule.betas[1] * (1 - schedule.alphas_cumprod[0]) / (1 - schedule.alphas_cumprod[1])
    np.testing.assert_allclose(got.variance[:, 0, 0, 0], [first, *schedule.betas[1:]], rtol=1e-5)
    with pytest.raises(UserError, match='outputs 6 channels for inputs of 4; expected 4'):
        split_output(jnp.zeros((1, 2, 2, 6)), channels=4)


@shared
@given(st.integers(4, 1000), st.integers(0, 2 ** 32 - 1))
def test_quarters_add_up(num_steps, seed):
    """rtol: at most 20 float32 additions."""
    rng = np.random.default_rng(seed)
    t, values = rng.integers(0, num_steps, 20), rng.uniform(0, 1, 20).astype(np.float32)
    sums, counts = per_quarter(jnp.asarray(values), jnp.asarray(t, jnp.int32), num_steps)
    np.testing.assert_array_equal(counts, np.histogram(t, np.arange(5) * num_steps / 4)[0])
    np.testing.assert_allclose(sums.sum(), values.sum(), rtol=1e-5)


def test_quarters_by_hand():
    sums, counts = per_quarter(jnp.array([1.0, 2.0, 4.0, np.nan]), jnp.array([0, 249, 250, 999]), 1000)
    np.testing.assert_array_equal(sums, [3, 4, 0, np.nan])   # the NaN stays where it is
    np.testing.assert_array_equal(counts, [2, 1, 0, 1])
