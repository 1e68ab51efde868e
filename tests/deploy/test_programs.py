"""Exported models, drawn with step by step: each state beside that of lit_jax from the same noise."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_archs import ARCHS, saved, weights

from lit_jax.deploy.export_model import export_model
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.samplers import SAMPLERS, sampling_schedule
from lit_jax.models.network import Network

TEXT = {'text': {'encoder': 'tiny', 'channels': 20, 'tokens': 7}}
CASES = [*(('ddim', name) for name in ARCHS), ('ddpm', 'lit'), ('dpm++', 'lit')]


@pytest.mark.peers
@pytest.mark.parametrize('method, name', CASES)
def test_trajectories_of_onnx_runtime_are_those_of_lit_jax(method, name, tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    network, params, steps = Network(ARCHS[name]), weights(ARCHS[name]), 5
    model = saved(tmp_path, ARCHS[name], channels=4, **(TEXT if network.conditioning == 'text' else {}))
    export_model(model, tmp_path / 'out', to='onnx')
    session = runtime.InferenceSession(str(tmp_path / 'out' / 'model.onnx'),
                                       providers=['CPUExecutionProvider'])
    rng, cond = np.random.default_rng(1), {'label': jnp.array([1, 3])}
    if network.conditioning == 'text':
        cond = {'text': rng.standard_normal((2, 7, 20), np.float32),
                'text_mask': np.array([7 * [1], 4 * [1] + 3 * [0]], np.int32)}
        cond |= {f'null_{key}': value[::-1] for key, value in cond.items()}
    x = jnp.asarray(rng.standard_normal((2, *network.arch['input_size'], 4), np.float32))
    noise = jnp.asarray(rng.standard_normal((steps, *x.shape), np.float32))

    def foreign(x, t, cond):
        out = jax.eval_shape(functools.partial(network.apply, params), x, t, cond)
        return jax.pure_callback(lambda x, t, cond: session.run(None, {
            'x': np.asarray(x), 't': np.asarray(t, np.int32),
            **{key: np.asarray(value) for key, value in cond.items()}})[0], out, x, t, cond)

    @functools.partial(jax.jit, static_argnums=0)
    def drawn(model_fn):
        return SAMPLERS[method](guide(model_fn, 1.5, network.guidance_pair), x, cond, trajectory=True,
                                schedule=sampling_schedule(method, steps),
                                noise=noise if method == 'ddpm' else None)

    expected, got = (np.asarray(drawn(fn)) for fn in (functools.partial(network.apply, params), foreign))
    assert len(got) == steps
    for state, ours in zip(got, expected, strict=True):
        np.testing.assert_allclose(state, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
