"""Flows against the code of SiT, REPA and LightningDiT: paths, conversions, times, losses; bad input."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import relative_error
from flow_goldens import DTYPES, load_flow, toy

from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.flow_paths import PATHS, PREDICTIONS, coefficients, convert_prediction
from lit_jax.diffusion.flow_samplers import FORMS
from lit_jax.diffusion.kinds import Ddpm, deciding, default_section, read_diffusion
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.runtime.errors import UserError

SIT = {'Linear': 'linear', 'GVP': 'gvp', 'VP': 'vp'}


@pytest.mark.parametrize('name, path', SIT.items())
def test_the_paths_of_sit(name, path, goldens):
    meta, arrays = load_flow(goldens / 'sit_transport.npz')
    c, official = coefficients(path, arrays['in_t'].astype(np.float64)), arrays[f'out64_{name}_coefficients']
    for mine, theirs in zip((c.alpha, c.d_alpha, c.sigma, c.d_sigma, c.growth), official, strict=True):
        np.testing.assert_allclose(np.broadcast_to(mine, theirs.shape), theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(c.spread, arrays[f'out64_{name}_drift_var'], rtol=1e-9)
    norm = meta['case']['norm']
    for form, value in FORMS.items():
        theirs = arrays[f'out64_{name}_diffusion_' + {'sbdm': 'SBDM'}.get(form, form.replace('_', '-'))]
        assert relative_error(value(arrays['in_t'].astype(np.float64), c, norm), theirs) < 1e-9, form
    ratio = c.sigma / c.alpha
    np.testing.assert_allclose(PATHS[path].time_of(ratio, np), arrays['in_t'], rtol=1e-6)


def test_predictions_convert_to_each_other_and_back():
    """At an inner time all four say the same of any x: there and back is where one began."""
    rng = np.random.default_rng(0)
    x1, x0 = rng.standard_normal((2, 4, 3, 3, 2))
    for path in PATHS:
        c = coefficients(path, np.array([0.05, 0.3, 0.6, 0.9]).reshape(-1, 1, 1, 1))
        x_t = c.alpha * x1 + c.sigma * x0
        truth = {'velocity': c.d_alpha * x1 + c.d_sigma * x0, 'noise': x0, 'clean': x1,
                 'score': -x0 / c.sigma}
        for given, wanted in itertools.product(PREDICTIONS, PREDICTIONS):
            got = convert_prediction(c, x_t, truth[given], given, wanted)
            np.testing.assert_allclose(got, truth[wanted], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype, bound', DTYPES)
def test_the_objectives_of_sit(dtype, bound, goldens):
    """Times, x_t, drift, score and loss of every path, prediction and weighting, all in the model's words."""
    _, arrays = load_flow(goldens / 'sit_transport.npz')
    errors = {}
    with jax.enable_x64(dtype == jnp.float64):
        x0, x1, t, u = (jnp.asarray(arrays[f'in_{name}'], dtype) for name in ('x0', 'x1', 't', 'u'))

        @jax.jit
        def everything(x0, x1, t, u):
            found = {}
            for (name, path), prediction in itertools.product(SIT.items(), ('velocity', 'noise', 'score')):
                flow, where = Flow(path, prediction), f'{name}_{prediction}'
                x_t = flow.add_noise(x1, t, x0)
                output = toy(prediction)(x_t, t, {})
                found |= {f'{name}_xt': x_t, f'{where}_train_t': flow.times_of(u),
                          f'{where}_ode_drift': flow.convert(output, x_t, t, 'velocity'),
                          f'{where}_score': flow.convert(output, x_t, t, 'score')}
                for weighting in ('none', 'velocity', 'likelihood'):
                    if prediction == 'velocity' and weighting != 'none':
                        continue
                    losses = Flow(path, prediction, weighting=weighting).losses(output, x1, x_t, t, x0)
                    found[f'{where}_loss_{"None" if weighting == "none" else weighting}'] = losses['mse']
            return found

        for name, value in everything(x0, x1, t, u).items():
            assert value.dtype == dtype
            errors[name] = relative_error(value, arrays[f'out64_{name}'])
    assert len(errors) == 3 + 27 + 21
    assert max(errors.values()) <= bound, {name: error for name, error in errors.items() if error > bound}


def test_the_intervals_of_sit(goldens):
    _, arrays = load_flow(goldens / 'sit_transport.npz')
    for (name, path), prediction in itertools.product(SIT.items(), ('velocity', 'noise', 'score')):
        training, ode = arrays[f'out64_{name}_{prediction}_intervals'][:2]
        assert Flow(path, prediction).interval() == tuple(training)
        assert Flow(path, prediction).interval(training=False) == tuple(ode)


def test_the_objective_of_repa_runs_the_other_way(goldens):
    """SILoss: t = 1 is noise, the velocity points to it; the model's output is held fixed."""
    _, arrays = load_flow(goldens / 'repa_sampling.npz')
    with jax.enable_x64(True):
        images, noise, v = (jnp.asarray(arrays[f'in_{name}'], jnp.float64)
                            for name in ('images', 'loss_noise', 'v'))
        for path, times in itertools.product(('linear', 'cosine'), ('uniform', 'lognormal')):
            flow = Flow(path, noise_at=1, times={'lognormal': 'log_normal'}.get(times, times))
            drawn = 1 - arrays['in_uniform'].astype(float) if times == 'uniform' else arrays['in_normal']
            t, name = flow.times_of(jnp.asarray(drawn.ravel(), jnp.float64)), f'out64_{path}_{times}'
            assert relative_error(t, arrays[f'{name}_t']) < 1e-9
            x_t = flow.add_noise(images, t, noise)
            assert relative_error(x_t, arrays[f'{name}_x_t']) < 1e-9
            loss, gradient = jax.value_and_grad(
                lambda v, flow=flow, x_t=x_t, t=t: flow.losses(v, images, x_t, t, noise)['mse'].mean())(v)
            assert relative_error(loss, arrays[f'{name}_denoising_loss'].mean()) < 1e-9
            assert relative_error(gradient, arrays[f'{name}_grad_v']) < 1e-9


def test_the_objective_of_lightningdit(goldens):
    """Logit-normal times, shifted towards the data by e^0.6, and the loss of the direction."""
    meta, arrays = load_flow(goldens / 'lightningdit_transport.npz')
    with jax.enable_x64(True):
        x0, x1, n = (jnp.asarray(arrays[f'in_{name}'], jnp.float64) for name in ('x0', 'x1', 'normal'))
        t = Flow(times='logit_normal').times_of(n)
        assert relative_error(t, arrays['out64_t_lognorm']) < 1e-9
        shifted = Flow(times='logit_normal', time_shift=float(np.exp(-meta['case']['mu']))).times_of(n)
        assert relative_error(shifted, arrays['out64_t_lognorm_shifted']) < 1e-9
        noise_model = Flow(prediction='noise', times='logit_normal').times_of(n)
        assert relative_error(noise_model, arrays['out64_t_lognorm_noise_prediction']) < 1e-9
        for name, path in SIT.items():
            flow = Flow(path, times='logit_normal', cosine=1.0)
            t = flow.times_of(n)
            x_t = flow.add_noise(x1, t, x0)
            output = toy('velocity')(x_t, t, {'label': jnp.asarray(arrays['in_y'])})
            losses = flow.losses(output, x1, x_t, t, x0)
            assert relative_error(losses['mse'], arrays[f'out64_{name}_loss']) < 1e-9
            assert relative_error(losses['cosine'], arrays[f'out64_{name}_cos_loss']) < 1e-9


def test_drawn_times_are_of_the_model_and_fall_into_quarters():
    key = jax.random.key(0)
    for flow in (Flow(), Flow(noise_at=1), Flow('vp', 'noise'), Flow(times='logit_normal', time_shift=3.0)):
        t = flow.draw_times(key, (4096,))
        assert t.dtype == jnp.float32 and 0 <= t.min() and t.max() <= 1
        sums, counts = flow.quarters(jnp.ones(len(t)), t)
        assert counts.sum() == len(t)
        np.testing.assert_array_equal(sums, counts)
    assert counts[3] > 2 * counts[0]      # shifted to the noise
    np.testing.assert_array_equal(Flow(noise_at=1).quarters(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))[0],
                                  [1, 0, 0, 2])


def test_the_unused_half_of_sits_output_is_dropped():
    flow, rng = Flow(), np.random.default_rng(1)
    output, x1, noise = (jnp.asarray(rng.standard_normal((2, 3, 3, channels)), jnp.float32)
                         for channels in (8, 4, 4))
    t = jnp.array([0.2, 0.7])
    assert flow.split(output, 4).shape == (2, 3, 3, 4)
    gradient = jax.grad(lambda output: flow.losses(output, x1, x1, t, noise)['mse'].sum())(output)
    assert jnp.abs(gradient[..., :4]).min() > 0 and not gradient[..., 4:].any()
    losses = flow.distillation(output, 2 * output, 4)
    assert list(losses) == ['distill_velocity']
    np.testing.assert_allclose(losses['distill_velocity'], jnp.square(output[..., :4]).mean((1, 2, 3)),
                               rtol=1e-6)
    with pytest.raises(UserError, match='outputs 6 channels for inputs of 4'):
        flow.split(output[..., :6], 4)


def test_sections_of_earlier_versions_are_ddpm():
    for section in ({'steps': 1000, 'kind': 'linear'}, {'steps': 1000}, {}, default_section()):
        assert read_diffusion(section) == Ddpm(1000, 'linear')
    assert read_diffusion({'steps': 50, 'kind': 'linear'}).to_json() == {'kind': 'ddpm', 'steps': 50,
                                                                        'schedule': 'linear'}
    flow = Flow('gvp', 'noise', 1, 'likelihood')
    assert read_diffusion(flow.to_json()) == flow
    assert deciding(flow.to_json()) == {'kind': 'flow', 'path': 'gvp', 'prediction': 'noise', 'noise_at': 1}


@pytest.mark.parametrize('section, message', [
    ({'path': 'lineer'}, "unknown diffusion.path 'lineer' .did you mean linear"),
    ({'prediction': 'v'}, "unknown diffusion.prediction 'v'"), ({'kind': 'flwo'}, 'did you mean flow'),
    ({'weighting': 'likelihood'}, 'a prediction of velocity has none'),
    ({'weighting': 'velocity', 'prediction': 'clean'}, 'a prediction of clean has none'),
    ({'time_shift': -1.0}, 'time_shift must be a number above 0, got -1'), ({'noise_at': 2}, 'noise_at'),
    ({'times': 'normal'}, 'unknown diffusion.times'), ({'cosine': -0.1}, 'from 0 on'),
    ({'cosine': 1.0, 'prediction': 'noise'}, 'compares velocities')])
def test_a_flow_that_there_is_not_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        read_diffusion({'kind': 'flow', **section})


@pytest.mark.parametrize('change, message', [
    ({'shift': -1.0}, 'shift must be a number above 0, got -1'), ({'steps': 0}, 'at least 1 step'),
    ({'method': 'ddpm'}, 'the sampler ddpm is for models of ddpm, this one is of flow: take euler'),
    ({'method': 'eular'}, 'unknown sampler'), ({'eta': 0.5}, 'belongs to ddim'),
    ({'sde_form': 'linear'}, 'belongs to sde'), ({'method': 'sde', 'steps': 1}, 'at least 2 steps'),
    ({'method': 'sde', 'sde_form': 'sbdm'}, 'is not finite'),
    ({'method': 'sde', 'last_step': 'last'}, 'last_step'),
    ({'method': 'sde', 'last_size': 1.5}, 'between 0 and 1'),
    ({'cfg_interval': (0.7, 0.1)}, 'guidance interval'),
    ({'method': 'dopri5', 'tolerance': 0.0}, 'tolerance must')])
def test_a_flow_cannot_be_drawn_with(change, message):
    settings = SamplerSettings(**{'method': 'euler', **change})
    with pytest.raises(UserError, match=message):
        settings.check(Flow().to_json())


def test_a_sampler_of_flows_is_refused_for_a_ddpm():
    with pytest.raises(UserError, match='the sampler euler is for models of flow, this one is of ddpm'):
        SamplerSettings('euler').check({'steps': 1000, 'kind': 'linear'})
    with pytest.raises(UserError, match='shift 3 is of flows'):
        SamplerSettings('dpm++', shift=3.0).check({'steps': 1000, 'kind': 'linear'})
