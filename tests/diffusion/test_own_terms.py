"""Terms of the loss that a recipe names: their part in the step, and what is no term."""
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.diffusion.kinds import Ddpm, Flow
from lit_jax.diffusion.own_terms import Seen, import_losses
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop, setup

HERE = __name__


def size(seen):
    return jnp.square(seen.output).mean((1, 2, 3))


def flat(seen):
    return seen.output.mean()


def recipe(*losses, **train):
    config = tiny_recipe(**train)
    config.train.losses = losses
    return config


@pytest.mark.parametrize('entry, says', [
    (('nowhere:loss', 1.0), r'the loss .nowhere:loss. cannot be imported: No module named.*PYTHONPATH'),
    ((f'{HERE}:none', 1.0), 'is no function of that module'), (('loss', 1.0), 'each term is a pair'),
    ((f'{HERE}:size', float('nan')), r'train\.losses.* must be a number'),
    (f'{HERE}:size', 'each term is a pair'),
    (('lit_jax.training.step:total', 1.0), 'there is a term total already')])
def test_what_is_no_term_is_told_with_the_recipe(entry, says):
    with pytest.raises(UserError, match=says):
        recipes.finalize(recipe(entry), 1)


def test_terms_have_the_names_of_their_functions_and_their_weights():
    terms = import_losses([[f'{HERE}:size', 2], (f'{HERE}:flat', 0.5)])
    assert [(term.name, term.weight) for term in terms] == [('size', 2.0), ('flat', 0.5)]
    objective = setup.build_objective(recipe((f'{HERE}:size', 0.25)))
    told = {'mse': 1.0, 'vb': 1.0, 'distill_noise': 0.5, 'distill_velocity': 0.5, 'distill_variance': 0.05,
            'size': 0.25}
    assert told.items() <= objective.weights.items()


def test_tables_of_a_schedule_are_no_part_of_a_flow():
    seen = {name: None for name in ('x0', 'x_t', 't', 'noise', 'cond', 'output', 'teacher_output')}
    assert Seen(Ddpm(steps=30), **seen).schedule.num_steps == 30
    with pytest.raises(UserError, match=r'reads seen\.schedule, but this recipe is a flow.*seen\.diffusion'):
        _ = Seen(Flow(), **seen).schedule


@pytest.mark.slow
def test_a_term_counts_in_the_total_and_is_logged(tmp_path):
    config = recipe((f'{HERE}:size', 0.25), steps=2, accumulate=2)
    config.log.every = 1
    assert loop.train(config, tmp_path / 'run') == 'done'
    for record in map(json.loads, (tmp_path / 'run' / 'metrics.jsonl').open()):
        np.testing.assert_allclose(record['loss/total'], record['loss/mse'] + record['loss/vb']
                                   + 0.25 * record['loss/size'], rtol=1e-5)
    assert record['loss/size'] > 0 and 'loss/size_q1' in record      # the first outputs are 0
    with pytest.raises(UserError, match=r'the loss flat returns the shape \(\); it must return one number'):
        loop.train(recipe((f'{HERE}:flat', 1.0), steps=1), tmp_path / 'flat')
