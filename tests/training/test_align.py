"""Alignment against the official code of Grafting: what goes in, what is learnt, losses and gradients."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights

from lit_jax.convert.torch_import import from_torch_state
from lit_jax.diffusion.alignment import alignment_loss
from lit_jax.models.layers import MIXER_INPUT, MIXER_OUTPUT
from lit_jax.models.network import Network


def load_golden(path, dtype):
    """(teacher, its weights, student, its weights, arrays): the student is the teacher with the operators."""
    meta, state, arrays = weights.load(path)
    config = meta['config']

    def read(blocks, prefix):
        return {name.removeprefix(prefix): value for name, value in blocks.items() if name.startswith(prefix)}

    sides = (config['input'],) * 2
    teacher = read(state, 'teacher.')
    operators = {f'blocks.{layer}.attn.{name}': value for layer in range(config['depth'])
                 for name, value in read(state, f'operator.{min(layer // 2 * 2, 2)}.').items()}
    student = {name: value for name, value in teacher.items() if '.attn.' not in name} | operators
    pairs = [from_torch_state(teacher, heads=config['heads'], input_size=sides),
             from_torch_state(student, heads=config['graft_heads'], input_size=sides)]
    networks = [Network(arch, dtype=dtype) for arch, _ in pairs]
    params = [jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree) for _, tree in pairs]
    return *zip(networks, params, strict=True), arrays, meta


@pytest.mark.parametrize('wide', [True, False])
def test_alignment_is_graftings(wide, goldens):
    with jax.enable_x64(wide):
        dtype, bound = (jnp.float64, 1e-9) if wide else (jnp.float32, 2e-5)
        (teacher, teacher_params), (student, params), arrays, meta = load_golden(goldens / 'graft_a.npz',
                                                                                   dtype)
        x = np.moveaxis(arrays['in_x'], 1, -1).astype(dtype)
        _, seen = jax.jit(lambda *args: teacher.observe(*args, (MIXER_INPUT, MIXER_OUTPUT)))(
            teacher_params, x, arrays['in_t'], {'label': arrays['in_y']})
        (inputs,), (targets,) = seen[MIXER_INPUT], seen[MIXER_OUTPUT]

        def one(loss, delta, own, build, x, target):
            return jax.value_and_grad(
                lambda own: alignment_loss(build(own)(x, (4, 4)), target, loss, delta))(own)

        for layer in meta['case']['layers']:
            close(inputs[layer], arrays[f'out64_layer{layer}_input'], bound)
            close(targets[layer], arrays[f'out64_layer{layer}_target'], bound)
        for name in meta['case']['losses']:
            loss, _, delta = name.replace('l2', 'mse').partition('_')
            function = functools.partial(one, loss, float(delta or 1))
            losses, grads = student.map_mixers(params, function, inputs, targets)['blocks']['attn']
            for layer in meta['case']['layers']:
                golden = f'out64_layer{layer}_{name}'
                close(losses[layer], arrays[f'{golden}_loss'], bound)
                for key, kernel in (('q', grads['q']['kernel']), ('proj', grads['proj']['kernel'])):
                    matrix = np.reshape(kernel[layer], (32, 32)).T
                    close(matrix, arrays[f'{golden}_grad_{key}.weight'], 10 * bound)
                close(grads['dwc']['bias'][layer], arrays[f'{golden}_grad_dwc.bias'], 10 * bound)


def close(got, want, bound):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= bound * np.abs(want).max()
