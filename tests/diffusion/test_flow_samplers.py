"""Samplers of flows against the code of SiT, REPA, LightningDiT and diffusers: every state."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_goldens import relative_error
from flow_goldens import DTYPES, load_flow, toy, toy_flow

from lit_jax.diffusion.flow import Flow
from lit_jax.diffusion.flow_samplers import flow_schedule, scan_rows
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.settings import SamplerSettings

PATHS = {'Linear': 'linear', 'GVP': 'gvp', 'VP': 'vp'}


def states_error(states, official):
    """The largest error of a state, each relative to its own largest value."""
    assert len(states) == len(official)
    return max(map(relative_error, states, official))


def sits_runs(arrays, case):
    """(name, flow, settings) of every fixed-step trajectory of the file."""
    for name in [name[6:] for name in arrays if name.startswith(('out64_ode', 'out64_sde'))]:
        kind, path, prediction, *rest = name.split('_')
        if kind == 'ode' and rest in (['euler'], ['heun2']):
            settings = SamplerSettings(rest[0], steps=case['ode_points'] - 1)
        elif kind == 'sde':
            method, form, last, norm = rest
            settings = SamplerSettings(
                {'Euler': 'sde', 'Heun': 'sde_heun'}[method], steps=case['sde_steps'] - (last == 'None'),
                sde_form=form.lower().replace('-', '_'), sde_norm=float(norm), last_step=last.lower(),
                last_size=case['last'])
        else:
            continue
        yield name, Flow(PATHS[path], prediction), settings


@pytest.mark.parametrize('dtype, bound', DTYPES)
def test_every_state_of_sits_samplers(dtype, bound, goldens):
    """All forms, last steps, paths and predictions as one batch: a table of evaluations is data."""
    meta, arrays = load_flow(goldens / 'sit_transport.npz')
    runs = list(sits_runs(arrays, meta['case']))
    assert len(runs) == 49
    with jax.enable_x64(dtype == jnp.float64):
        z, noise = jnp.asarray(arrays['in_z'], dtype), jnp.asarray(arrays['in_noise'], dtype)
        schedules = [flow_schedule(flow, settings) for _, flow, settings in runs]
        most = max(len(schedule.time) for schedule in schedules)
        tables = [{name: jnp.pad(column, (0, most - len(column)))
                   for name, column in schedule.rows(dtype, whole=True).items()}
                  for schedule in schedules]
        predictions = [('velocity', 'noise', 'score').index(flow.prediction) for _, flow, _ in runs]

        def run(rows, prediction):
            def predict(x, t_B, _):
                u, f = t_B[:, None, None, None], toy_flow(x, t_B)
                noise = (1 - u) * x + u * f
                return jnp.stack([f, noise, -noise])[prediction]

            return scan_rows(predict, z, rows, lambda step: jnp.pad(noise, ((0, 1), *[(0, 0)] * 4))[step])[1]

        stacked = jax.tree.map(lambda *columns: jnp.stack(columns), *tables)
        states = np.asarray(jax.jit(jax.vmap(run))(stacked, jnp.asarray(predictions)))
    assert states.dtype == dtype
    errors = {}
    for (name, _, settings), schedule, mine in zip(runs, schedules, states, strict=True):
        official = arrays[f'out64_{name}'][1 if name.startswith('ode') else 0:][:settings.steps]
        errors[name] = states_error(mine[np.flatnonzero(schedule.ends)], official)
    assert max(errors.values()) <= bound, {name: error for name, error in errors.items() if error > bound}


REPA = [f'{kind}_cfg{guidance}' for kind in ('euler_linear', 'euler_linear_heun', 'maruyama_linear',
                                             'maruyama_cosine')
        for guidance in ('1_0_1', '2.5_0_1', '1.8_0_0.7', '3_0.25_0.75')]


def repas_run(name, steps):
    """(flow, settings) of a golden trajectory of REPA."""
    kind, path, *heun, scale, low, high = name.split('_')
    method = 'sde' if kind == 'maruyama' else 'heun' if heun else 'euler'
    return Flow(path, noise_at=1), SamplerSettings(
        method, steps, cfg_interval=(float(low), float(high)), cfg_scale=float(scale[3:]),
        sde_form='linear' if method == 'sde' else 'sigma')


def interpreted(schedule, model, x, noise=None):
    """(states after each step, [(x, time, rows) of each evaluation]) of a table, in numpy: see FlowSchedule.
    model: (x, time, guided_at) -> (output, rows)."""
    base, k_before, states, calls = x, 0 * x, [], []
    for i, step in enumerate(schedule.step):
        drawn = 0.0 if noise is None or step >= len(noise) else noise[step]
        x = x + schedule.before[i] * drawn
        if i == 0 or schedule.ends[i - 1]:
            base = x
        output, rows = model(x, schedule.time[i], schedule.guided_at[i])
        calls.append((x, schedule.time[i], rows))
        k = schedule.of_x[i] * x + schedule.of_output[i] * schedule.flow.split(output, x.shape[-1])
        x = schedule.keep[i] * base + schedule.now[i] * k + schedule.earlier[i] * k_before
        x, k_before = x + schedule.after[i] * drawn, k
        if schedule.ends[i]:
            states.append(x)
    return states, calls


def toy_numpy(x, t, labels):
    """`toy_flow`, without a compiler."""
    return np.asarray(toy_flow(x, np.full(len(x), t), labels, xp=np))


@pytest.mark.parametrize('name', REPA)
def test_every_evaluation_of_repas_samplers(name, goldens):
    """States, times, and where both halves are computed: 16 settings of guidance, solver and path."""
    meta, arrays = load_flow(goldens / 'repa_sampling.npz')
    flow, settings = repas_run(name, meta['case']['steps'])
    settings.check(flow.to_json())
    low, high = flow.guided_times(settings.cfg_interval) or (0, 1)
    labels = arrays['in_y']

    def model(x, t, guided_at):
        given = toy_numpy(x, t, labels)
        if settings.cfg_scale == 1 or not low <= guided_at <= high:
            return given, len(x)
        null = toy_numpy(x, t, np.full_like(labels, 1000))
        return null + settings.cfg_scale * (given - null), 2 * len(x)

    schedule = flow_schedule(flow, settings)
    noise = arrays['in_noise'] if settings.method == 'sde' else None
    states, calls = interpreted(schedule, model, arrays['in_z'].astype(np.float64), noise)
    x, t, rows = zip(*calls, strict=True)
    assert len(calls) == settings.evaluations and list(rows) == arrays[f'out_{name}_model_rows'].tolist()
    assert states_error(x, arrays[f'out64_{name}_model_x']) < 1e-9
    np.testing.assert_allclose(t, arrays[f'out64_{name}_model_t'], rtol=0, atol=1e-9)
    assert relative_error(states[-1], arrays[f'out64_{name}']) < 1e-9


def test_guidance_is_decided_at_the_start_of_a_step(goldens):
    """The compiled sampler around `guide`, REPA's Heun in the middle of the schedule."""
    meta, arrays = load_flow(goldens / 'repa_sampling.npz')
    name = 'euler_linear_heun_cfg3_0.25_0.75'
    flow, settings = repas_run(name, meta['case']['steps'])

    def with_null(cond):
        return cond, {'label': jnp.full_like(cond['label'], 1000)}

    with jax.enable_x64(True):
        z, cond = jnp.asarray(arrays['in_z'], jnp.float64), {'label': jnp.asarray(arrays['in_y'])}
        model = guide(toy('velocity'), settings.cfg_scale, with_null, 'all',
                      flow.guided_times(settings.cfg_interval))
        end = jax.jit(lambda z: flow.sampler(settings)(model, z, cond))(z)
    assert relative_error(end, arrays[f'out64_{name}']) < 1e-9


@pytest.mark.parametrize('shift', [0.3, 3.0])
@pytest.mark.parametrize('method', ['euler', 'heun2'])
def test_lightningdits_shifted_samplers(method, shift, goldens):
    meta, arrays = load_flow(goldens / 'lightningdit_transport.npz')
    grid = flow_schedule(Flow(), SamplerSettings('euler', meta['case']['grid'] - 1, shift=1 / shift)).time
    np.testing.assert_allclose(grid, arrays[f'out64_grid_shift{shift:g}'][:-1], rtol=0, atol=1e-9)
    schedule = flow_schedule(Flow(), SamplerSettings(method, meta['case']['points'] - 1, shift=1 / shift))
    states, _ = interpreted(schedule, lambda x, t, _: (toy_numpy(x, t, arrays['in_y'][:2]), 2),
                            arrays['in_z'].astype(np.float64))
    assert states_error(states, arrays[f'out64_ode_{method}_shift{shift:g}'][1:]) < 1e-9


@pytest.mark.parametrize('shift', [1, 3])
@pytest.mark.parametrize('steps', [20, 8])
def test_dpm_solver_has_the_flow_sigmas_of_diffusers(shift, steps, goldens):
    _, arrays = load_flow(goldens / 'flow_schedulers.npz')
    name, flow = f'out64_dpm_shift{shift}_{steps}', Flow(noise_at=1)
    schedule = flow_schedule(flow, SamplerSettings('dpm++', steps, shift=float(shift)))
    np.testing.assert_allclose(schedule.time, arrays[f'{name}_model_t'], rtol=0, atol=1e-9)
    states, _ = interpreted(schedule, lambda x, t, _: (toy_numpy(x, t, arrays['in_y']), 2),
                            arrays['in_z'].astype(np.float64))
    assert states_error(states, arrays[f'{name}_states'][1:]) < 1e-9


def test_the_adaptive_sampler_ends_within_its_tolerance_whatever_its_neighbours(goldens):
    _, arrays = load_flow(goldens / 'sit_transport.npz')
    official = np.asarray(arrays['out64_ode_Linear_velocity_dopri5'][-1])
    exact = arrays['ref_ode_Linear_velocity_exact']

    def ends(z, tolerance, steps=50):
        settings = SamplerSettings('dopri5', steps, tolerance=tolerance)
        return np.asarray(jax.jit(lambda z: Flow().sampler(settings)(toy('velocity'), z, {}))(z))

    z = jnp.asarray(arrays['in_z'], jnp.float32)
    allowed = max(3 * np.abs(official - exact).max(), 1e-3 * np.abs(exact).max())
    assert np.abs(ends(z, 1e-3) - exact).max() <= allowed
    with jax.enable_x64(True):
        assert np.abs(ends(jnp.asarray(arrays['in_z'], jnp.float64), 1e-8, 200) - exact).max() <= 1e-6
    alone = ends(jnp.stack([z[1], 20 * z[0]]), 1e-3)
    np.testing.assert_array_equal(alone[0], ends(z, 1e-3)[1])
