"""Models as ONNX and StableHLO: the same outputs as here, with a batch of any size, without lit_jax."""
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from student_archs import ARCHS, FLOW, saved, weights

from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.commands.export import ExportOptions
from lit_jax.deploy.export_model import describe, export_model
from lit_jax.deploy.programs import NOISY
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.program import build_sampler

TEXT = {'encoder': 'tiny', 'channels': 20, 'tokens': 7}
WITHIN = {'rtol': 0, 'atol': 2e-5}


def folder_of(name, tmp_path, **changes):
    text = {'text': TEXT} if ARCHS[name]['family'] == 'pixart' else {}
    return saved(tmp_path, ARCHS[name], channels=4, **text, **changes)


def inputs_of(network, batch=3, size=None):
    """(x, t, cond) of the model, numpy."""
    rng = np.random.default_rng(1)
    shape = batch, *(size or network.arch['input_size']), network.arch['channels']
    x = rng.standard_normal(shape, np.float32)
    if network.conditioning == 'label':
        cond = {'label': np.array([1, 5, 0, 4][:batch], np.int32)}
    else:
        mask = (np.arange(7) < np.array([7, 4, 2, 1])[:batch, None]).astype(np.int32)
        cond = {'text': rng.standard_normal((batch, 7, 20), np.float32), 'text_mask': mask}
    return x, np.array([3, 977, 500, 0][:batch], np.int32), cond


def run_onnx(folder, **inputs):
    runtime = pytest.importorskip('onnxruntime')
    session = runtime.InferenceSession(str(folder / 'model.onnx'), providers=['CPUExecutionProvider'])
    return session.run(None, inputs)[0]


@pytest.mark.peers
@pytest.mark.parametrize('name', ARCHS)
def test_onnx_runtime_gives_the_outputs_of_lit_jax(name, tmp_path):
    pytest.importorskip('onnx')
    export_model(folder_of(name, tmp_path), tmp_path / 'out', to='onnx')
    network = Network(ARCHS[name])
    x, t, cond = inputs_of(network)
    expected = np.asarray(jax.jit(network.apply)(weights(network.arch), x, t, cond))
    for batch in (3, 1):
        part = {key: value[:batch] for key, value in cond.items()}
        got = run_onnx(tmp_path / 'out', x=x[:batch], t=t[:batch], **part)
        np.testing.assert_allclose(got, expected[:batch], **WITHIN)


@pytest.mark.peers
def test_gates_near_zero_take_their_own_road_in_onnx(tmp_path):
    """DiG's chunks have a form for trained gates and one for any (`gla_chunked`), chosen while it runs."""
    pytest.importorskip('onnx')
    model = folder_of('dig', tmp_path)
    config, params = load_model_folder(model)
    gates = params['blocks']['attn']['decay_out']
    odd = np.arange(gates['bias'].shape[-1]) % 2 == 1
    gates['bias'] = np.where(odd, gates['bias'], np.float32(-3000))      # log σ(-3000)/16 = -187 a token
    save_model_folder(model, config, params, overwrite=True)
    export_model(model, tmp_path / 'out', to='onnx')
    network = Network(ARCHS['dig'])
    x, t, cond = inputs_of(network)
    expected = np.asarray(jax.jit(network.apply)(params, x, t, cond))
    np.testing.assert_allclose(run_onnx(tmp_path / 'out', x=x, t=t, **cond), expected, **WITHIN)


@pytest.mark.peers
def test_a_text_model_takes_any_sides(tmp_path):
    pytest.importorskip('onnx')
    export_model(folder_of('pixart lit', tmp_path), tmp_path / 'out', to='onnx', any_size=True)
    network = Network(ARCHS['pixart lit'])
    x, t, cond = inputs_of(network, size=(12, 6))
    expected = jax.jit(network.apply)(weights(network.arch), x, t, cond)
    np.testing.assert_allclose(run_onnx(tmp_path / 'out', x=x, t=t, **cond), expected, **WITHIN)


@pytest.mark.peers
@pytest.mark.parametrize('method, to', [('ddpm', 'onnx'), ('ddim', 'onnx'), ('dpm++', 'onnx'),
                                        ('ddpm', 'stablehlo'), ('heun', 'onnx'), ('sde', 'onnx'),
                                        ('dopri5', 'stablehlo')])
def test_the_exported_sampler_draws_the_images_of_lit_jax(method, to, tmp_path):
    if to == 'onnx':
        pytest.importorskip('onnx')
    flags = SamplerSettings(method=method, steps=6, cfg_scale=1.5)
    kind = {'diffusion': FLOW} if method in ('heun', 'sde', 'dopri5') else {}
    export_model(folder_of('lit', tmp_path, **kind), tmp_path / 'out', to=to, sampler=True, flags=flags)
    network, rng = Network(ARCHS['lit']), np.random.default_rng(2)
    inputs = {'noise': rng.standard_normal((2, 8, 8, 4), np.float32), 'label': np.array([1, 3], np.int32)}
    steps = rng.standard_normal((6, 2, 8, 8, 4), np.float32) if method in NOISY else None
    config = load_model_folder(tmp_path / 'model')[0]
    sample = jax.jit(build_sampler(network, flags, config))
    expected = sample(weights(network.arch), inputs['noise'], {'label': jnp.array([1, 3])}, None, steps)
    inputs |= {} if steps is None else {'step_noise': steps}
    if to == 'onnx':
        got = run_onnx(tmp_path / 'out', **inputs)
    else:
        got = run_stablehlo(tmp_path / 'out', inputs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def run_stablehlo(folder, inputs):
    """By the program of the folder's README, in a process that has jax and no lit_jax."""
    np.savez(folder / 'inputs.npz', **inputs)
    code = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]
    code = re.sub(r'inputs = \{.*?\}\n', "inputs = dict(np.load('inputs.npz'))\n", code, flags=re.DOTALL)
    output = re.search(r'print\((\w+)\.shape\)', code)[1]
    code += f"\nimport sys\nassert 'lit_jax' not in sys.modules\nnp.save('got.npy', {output})"
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / 'got.npy')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['hybrid', 'dydila', 'dig'])
def test_stablehlo_runs_without_lit_jax(name, tmp_path):
    export_model(folder_of(name, tmp_path), tmp_path / 'out', to='stablehlo')
    network = Network(ARCHS[name])
    x, t, cond = inputs_of(network)
    expected = np.asarray(jax.jit(network.apply)(weights(network.arch), x, t, cond))
    np.testing.assert_allclose(run_stablehlo(tmp_path / 'out', {'x': x, 't': t, **cond}), expected, **WITHIN)


@pytest.mark.peers
def test_int8_says_its_error(tmp_path):
    pytest.importorskip('onnxruntime')
    wide = {**ARCHS['lit'], 'width': 64}
    model = saved(tmp_path, wide, channels=4)
    done, whole = (export_model(model, tmp_path / name, to='onnx', int8=name == 'small')
                   for name in ('small', 'whole'))
    assert done.size < 0.5 * whole.size
    assert 0 < done.error < 0.05 and f'of the output {done.error:.1%}' in describe(done)


@pytest.mark.parametrize('options, said', [
    ({'to': 'stablehlo', 'int8': True}, '--int8 belongs to --to onnx'),
    ({'to': 'stablehlo', 'any_size': True}, '--any_size is for the function of a text model'),
    ({'to': 'stablehlo', 'out': 'other'}, 'other exists already; give another --out'),
    ({'to': 'stablehlo', 'out': 'other', 'overwrite': True}, 'other was not written by --to stablehlo'),
    ({'to': 'stablehlo', 'sampler': True, 'flags': SamplerSettings(steps=2000)}, '2000'),
    ({'to': 'stablehlo', 'src': 'nowhere'}, 'nowhere does not exist'),
    pytest.param({'to': 'stablehlo', 'src': 'broken'}, 'holds NaN or infinity', marks=pytest.mark.slow)])
def test_what_cannot_be_exported_is_told_and_nothing_written(options, said, tmp_path):
    model = folder_of('gelu', tmp_path)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'file').touch()
    if options.get('src') == 'broken':
        config, params = load_model_folder(model)
        last = params['final_layer']['linear']
        last['bias'] = np.full_like(last['bias'], np.nan)
        save_model_folder(tmp_path / 'broken', config, params)
    before = sorted(path.name for path in tmp_path.rglob('*'))
    options = {'src': 'model', 'out': 'out', **options}
    src, out = (tmp_path / options.pop(name) for name in ('src', 'out'))
    with pytest.raises(UserError, match=re.escape(said)):
        export_model(src, out, **options)
    assert sorted(path.name for path in tmp_path.rglob('*')) == before


def test_settings_of_a_sampler_want_one():
    with pytest.raises(UserError, match='--steps requires --sampler'):
        ExportOptions(src='model', to='onnx', out='out', steps=3)
