import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lit_jax.models.layers import build_stack, run_stack
from lit_jax.models.probe import show, watching


class Showing(nnx.Module):
    """A block that shows the sum of what comes in, and of its own weight."""

    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x):
        show('input', x.sum())
        show('weight', lambda: self.weight[...])
        return x + self.weight[...]


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_stack_shows_what_its_blocks_show(scan, remat):
    stack = build_stack(Showing, 3, nnx.Rngs(0))
    with watching('input', 'weight') as seen:
        y = run_stack(stack, jnp.ones(2), scan=scan, remat=remat)
    weights = np.asarray(stack.weight[...])
    np.testing.assert_allclose(seen['weight'][0], weights)
    np.testing.assert_allclose(seen['input'][0], 2 * (1 + np.concatenate([[0], np.cumsum(weights)[:-1]])),
                               rtol=1e-6)
    np.testing.assert_allclose(y, 1 + weights.sum(), rtol=1e-6)


def test_nothing_is_computed_that_nobody_watches():
    def never():
        raise AssertionError('computed')

    show('other', never)
    with watching('input') as seen:
        show('other', never)
    assert seen == {'input': []}


def test_the_inner_watcher_gets_it():
    with watching('a') as outer:
        with watching('a') as inner:
            show('a', 1)
        show('a', 2)
    assert (outer, inner) == ({'a': [2]}, {'a': [1]})
