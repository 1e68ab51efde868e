"""The teacher's terms: their definition, and which gradients they give to whom."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.diffusion.distillation import distillation_losses, total_loss
from lit_jax.runtime.errors import UserError


def outputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(3, 4, 4, 6)), dtype) for _ in range(2))


def test_terms_are_the_mean_squared_differences_of_their_channels():
    """rtol: sums of 48 numbers in float32."""
    student, teacher = outputs()
    got = distillation_losses(student, teacher)
    squares = np.square(np.asarray(student, np.float64) - np.asarray(teacher, np.float64))
    np.testing.assert_allclose(got['distill_noise'], squares[..., :3].mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(got['distill_variance'], squares[..., 3:].mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize('name, mine, other', [('distill_noise', slice(0, 3), slice(3, 6)),
                                               ('distill_variance', slice(3, 6), slice(0, 3))])
def test_each_term_reaches_its_own_channels_of_the_student_only(name, mine, other):
    student, teacher = outputs()
    to_student, to_teacher = jax.grad(lambda s, t: distillation_losses(s, t)[name].sum(), argnums=(0, 1))(
        student, teacher)
    assert (to_student[..., mine] != 0).all() and (to_student[..., other] == 0).all()
    assert (to_teacher == 0).all()


def test_bfloat16_outputs_are_compared_in_float32():
    student, teacher = outputs(jnp.bfloat16)
    got = distillation_losses(student, teacher)
    want = distillation_losses(student.astype(jnp.float32), teacher.astype(jnp.float32))
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], want[name])


def test_float64_stays(x64):
    student, teacher = outputs(jnp.float64)
    assert all(value.dtype == jnp.float64 for value in distillation_losses(student, teacher).values())


def test_an_equal_teacher_costs_nothing():
    student, _ = outputs()
    assert all((value == 0).all() for value in distillation_losses(student, student).values())


def test_total_weighs_the_teachers_terms():
    parts = {'mse': 1.0, 'vb': 10.0, 'distill_noise': 100.0, 'distill_variance': 1000.0}
    weights = {'mse': 1.0, 'vb': 1.0, 'distill_noise': 0.5, 'distill_variance': 0.05}
    assert total_loss(parts, weights) == 1 + 10 + 50 + 50
    assert total_loss({'mse': 1.0, 'vb': 10.0}, weights) == 11


def test_outputs_of_another_size_are_refused():
    with pytest.raises(UserError, match='the same image size and channels'):
        distillation_losses(jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 8, 8, 8)))
