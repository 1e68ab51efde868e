"""The step of the alignment stage: every mixer of the student learns its block of the teacher's attention.

All blocks at once from one forward pass of the teacher; no gradient passes through a block (Grafting, arXiv
2506.05340, stage 1). Only mixers are trained."""
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from lit_jax.diffusion.alignment import relative_alignment_loss
from lit_jax.models.layers import MIXER_INPUT, MIXER_OUTPUT, Array
from lit_jax.models.network import Network
from lit_jax.models.probe import watching
from lit_jax.models.t5 import T5Network
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, pick
from lit_jax.training.step import Objective, accumulated, gradient_metrics, step_inputs, updated

FAMILIES = ('dit', 'pixart')     # of equal blocks with one mixer each
ERROR = 'align/error_'           # metrics: with the number of the block (lit_jax/report/html.py)


def check_alignable(teacher: Mapping, student: Mapping, where: str = '', field: str = 'align.steps') -> None:
    """UserError unless each block of the student has its block of the same width in the teacher.
    teacher, student: architectures. where: the teacher's folder. field: of the recipe, that needs it."""
    for name in ('family', 'depth', 'width', 'patch'):
        if teacher[name] != student[name]:
            raise UserError(f'the student (model.{name} {student[name]}) cannot be aligned with the teacher '
                            f'{f"{where} " if where else ""}({name} {teacher[name]}): each block learns from '
                            f'its own. Give a teacher of the same {name}, or {field}=0')
    if student['family'] not in FAMILIES:
        raise UserError(f'the family {student["family"]} cannot be aligned (only {", ".join(FAMILIES)}); set '
                        f'{field}=0')


def attention_pairs(teacher: Network, teacher_params: dict, inputs: Mapping[str, Array]
                    ) -> tuple[Array, Array, tuple[int, int]]:
    """(what enters the teacher's attention, what it returns, both [depth, B, N, D]; the grid of tokens)."""
    _, seen = teacher.observe(teacher_params, inputs['x_t'], inputs['t'], inputs['cond'],
                              (MIXER_INPUT, MIXER_OUTPUT))
    entered, returned = (jax.lax.stop_gradient(jnp.concatenate(seen[name]))
                         for name in (MIXER_INPUT, MIXER_OUTPUT))
    rows, columns = (side // teacher.arch['patch'] for side in inputs['x_t'].shape[1:3])
    return entered, returned, (rows, columns)


def make_align_step(network: Network, optimizer: optax.GradientTransformation, objective: Objective,
                    teacher: Network, vae: VaeNetwork | None = None, text_encoder: T5Network | None = None, *,
                    loss: str = 'mse', delta: float = 1.0) -> Callable:
    """align_step(state, frozen, batch, key) -> (state, metrics), as `make_train_step`'s.

    metrics: 'loss/align', the mean over blocks of `relative_alignment_loss`; 'align/error_00', ...: of each
    block the squared error over the variance of its target; `gradient_metrics`."""

    def of_block(grid, params, build, entered, returned):
        def errors(params):
            with watching(*network.losses) as seen:
                output = build(params)(entered.astype(network.dtype), grid)
            balance = sum(objective.balance_weight * value for values in seen.values() for value in values)
            squared = relative_alignment_loss(output, returned)
            own = squared if loss == 'mse' else relative_alignment_loss(output, returned, loss, delta)
            return own + balance, (own, squared)

        grads, (own, squared) = jax.grad(errors, has_aux=True)(params)
        return {'grads': grads, 'loss': own, 'squared': squared}

    def gradient(params, teacher_params, inputs):
        entered, returned, grid = attention_pairs(teacher, teacher_params, inputs)

        def function(*args):
            return of_block(grid, *args)

        results = network.map_mixers(params, function, entered, returned)
        grads = {run: {'attn': result['attn']['grads']} for run, result in results.items()}
        mean, squared = (_of_blocks(results, name) for name in ('loss', 'squared'))
        metrics = {'loss/align': mean.mean(), 'loss/total': mean.mean()}
        metrics |= {f'{ERROR}{block:02d}': squared[block] for block in range(len(squared))}
        return grads, metrics

    gradient = accumulated(gradient, objective.accumulate)

    def align_step(state, frozen, batch, key):
        inputs = step_inputs(state, frozen, batch, key, objective, network, vae, text_encoder)
        grads, metrics = gradient(state['params'], frozen['teacher'], inputs)
        trained = pick(state['params'], named_leaves(state['ema']))
        grads = pick(grads, named_leaves(trained))
        return updated(state, trained, grads, optimizer, objective), metrics | gradient_metrics(grads)

    return align_step


def block_errors(network: Network, params: dict, teacher: Network, teacher_params: dict,
                 inputs: Mapping[str, Array]) -> Array:
    """[depth]: of each block the squared error over the variance of its target. inputs: x_t, t and cond."""
    entered, returned, grid = attention_pairs(teacher, teacher_params, inputs)

    def error(params, build, entered, returned):
        output = build(params)(entered.astype(network.dtype), grid)
        return {'error': relative_alignment_loss(output, returned)}

    return _of_blocks(network.map_mixers(params, error, entered, returned), 'error')


def _of_blocks(results: Mapping, name: str) -> Array:
    return jnp.concatenate([result['attn'][name] for result in results.values()])
