"""Writes a model, or its guided sampler, as a folder for ONNX Runtime or for jax alone."""
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from lit_jax.checkpoint.load import read_weights_config
from lit_jax.checkpoint.model_folder import CONFIG
from lit_jax.convert.torch_export import load_arrays_of, published, write_whole
from lit_jax.deploy import onnx_file, stablehlo
from lit_jax.deploy.programs import Program, model_program, sampler_program, sampler_settings
from lit_jax.models.arch import conditioning
from lit_jax.models.network import Network
from lit_jax.runtime import storage
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.runtime.paths import as_path, check_folder, local_path

README = 'README.md'
FILES = {'onnx': (onnx_file.FILE, onnx_file.DATA), 'stablehlo': (stablehlo.FILE, stablehlo.WEIGHTS)}
_READ = {'onnx': '''import onnxruntime

session = onnxruntime.InferenceSession('model.onnx')
inputs = {{{arrays}}}
{output}, = session.run(None, inputs)''', 'stablehlo': '''import pathlib
from jax import export
from safetensors.numpy import load_file

program = export.deserialize(bytearray(pathlib.Path('model.stablehlo').read_bytes()))
inputs = {{{arrays}}}
{output} = program.call(load_file('model.safetensors'), **inputs)'''}


@dataclass(frozen=True)
class Exported:
    """What was written. error: of int8, relative, of the model's output (None: not measured)."""
    out: Path
    program: Program
    size: int
    matrix_errors: list[float]
    error: float | None = None


@claims_out
def export_model(src, out, *, to: str, sampler: bool = False, flags=None, int8: bool = False,
                 any_size: bool = False, overwrite: bool = False) -> Exported:
    """Writes the folder `out`, all of it or nothing.

    to: 'onnx' or 'stablehlo'. sampler: the whole guided sampler, with the settings of `flags`. int8: of ONNX,
    matrices in 8 bit. any_size: of a text model, images of any size. UserError for what cannot be written."""
    src, out = as_path(src), local_path(out)
    check_folder(out.parent, f'--out {out}')
    config = read_weights_config(src)
    _check(config, out, to, sampler, int8, any_size, overwrite)
    scan = to != 'onnx'      # a loop over the blocks would copy the weights at each step of ONNX
    program = (sampler_program(config, sampler_settings(config, flags), scan_layers=scan) if sampler
               else model_program(config, any_size=any_size, scan_layers=scan))
    config, params = load_arrays_of(src)
    told = published(config)
    errors: list[float] = []

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(told, indent=2) + '\n')
        (folder / README).write_text(readme(program, to, told))
        if to == 'onnx':
            errors.extend(onnx_file.write_onnx(folder, program, params, told, int8))
        else:
            stablehlo.write_stablehlo(folder, program, params)
        storage.fsync_tree(folder)

    write_whole(out, params, write)
    size = sum((out / name).stat().st_size for name in FILES[to])
    done = Exported(out, program, size, errors)
    return replace(done, error=output_error(out, config, params)) if int8 and not sampler else done


def _check(config: Mapping, out: Path, to: str, sampler: bool, int8: bool, any_size: bool,
           overwrite: bool) -> None:
    if to == 'onnx':
        onnx_file.check_onnx()
    elif int8:
        raise UserError('--int8 belongs to --to onnx')
    if any_size and (sampler or conditioning(config['model']) != 'text'):
        raise UserError('--any_size is for the function of a text model; a model of classes has one size, '
                        'and a sampler the size of its noise')
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f'{out} exists already; give another --out, or --overwrite to replace it')
    if not out.is_dir() or {path.name for path in out.iterdir()} != {CONFIG, README, *FILES[to]}:
        raise UserError(f'{out} was not written by --to {to}, so it is not overwritten')


def readme(program: Program, to: str, config: Mapping) -> str:
    """How the folder is used, as a program that runs in it."""
    def given(name: str, array) -> str:
        sizes = [_example(size) for size in array.shape]
        if np.issubdtype(array.dtype, np.integer):
            return f'{name!r}: np.ones({sizes}, np.int32)'
        return f'{name!r}: np.random.default_rng(0).standard_normal({sizes}, np.float32)'

    arrays = ',\n          '.join(given(*pair) for pair in program.inputs.items())
    rows = [f'| `{name}` | {array.dtype} [{", ".join(map(str, array.shape))}] | {MEANING[name]} |'
            for name, array in program.inputs.items()]
    sampler = f' sampler ({program.settings.describe()})' if program.settings else ''
    source = (config.get('provenance') or {}).get('source') or 'a training run'
    return '\n'.join([
        f'# {config["model"]["family"]}{sampler}, made from {source}', '',
        'Written by lit_jax. The weights have the licence of those that they were made from.', '',
        '| input | dtype, shape | meaning |', '|---|---|---|', *rows, '',
        f'It gives `{program.output}`: {MEANING[program.output]}', '', '```python', 'import numpy as np',
        _READ[to].format(arrays=arrays, output=program.output), f'print({program.output}.shape)', '```', ''])


MEANING = {
    'x': 'noisy images or latents', 't': 'timesteps, or the times of a flow',
    'label': 'classes; the null class is their number', 'text': 'features of the captions',
    'text_mask': '0 for padding',
    'noise': 'standard normal', 'step_noise': 'standard normal, of each step',
    'null_text': 'features of the empty caption', 'null_text_mask': '0 for padding',
    'output': 'float32 [batch, H, W, C]: the predicted noise, then the raw variance of models that learn it',
    'images': 'float32 [batch, H, W, C]: pixels from -1 to 1, or latents divided by their scale'}


def _example(size) -> int:
    """A size for the example: 2 in the place of each name."""
    return size if isinstance(size, int) else int(np.prod([
        2 if part.isidentifier() else int(part) for part in re.split(r'\*', str(size))]))


def output_error(folder: Path, config: Mapping, params: Mapping) -> float | None:
    """|int8 - float32| / |float32| of the model's output for random inputs; None without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    network, rng = Network(config['model']), np.random.default_rng(0)
    x, t, cond = network.example_inputs(2)

    def draw(name, array):
        if name == 'label':
            return rng.integers(0, network.null_label, array.shape, np.int32)
        if name == 'text_mask':
            return np.ones(array.shape, np.int32)
        return rng.standard_normal(array.shape, np.float32)

    inputs = {'x': draw('x', x), 't': np.array([100, 700], np.int32),
              **{name: draw(name, array) for name, array in cond.items()}}
    session = onnxruntime.InferenceSession(str(folder / onnx_file.FILE), providers=['CPUExecutionProvider'])
    got, = session.run(None, inputs)
    wanted = jax.jit(network.apply)(params, inputs.pop('x'), inputs.pop('t'), inputs)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def describe(done: Exported) -> str:
    """For the terminal."""
    lines = [f'written  {done.out}  {human_bytes(done.size)}',
             'inputs   ' + ', '.join(f'{name} [{", ".join(map(str, array.shape))}]'
                                     for name, array in done.program.inputs.items())]
    if done.matrix_errors:
        said = 'not measured: pip install onnxruntime' if done.error is None else f'{done.error:.1%}'
        lines.append(f'int8     error of the matrices {np.mean(done.matrix_errors):.2%}, of the output '
                     f'{said} (relative, random inputs)')
    return '\n'.join([*lines, f'next     {done.out / README} says how it is used'])
