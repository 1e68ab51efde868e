"""Guidance as DiT does it. (Whole models with guidance: tests/models/test_dit.py,
tests/diffusion/test_samplers.py.)"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_jax.diffusion.guidance import guide, guided_timesteps
from lit_jax.runtime.errors import UserError

NULL = 10


def to_null(cond):
    return cond, {'label': jnp.full_like(cond['label'], NULL)}


def model(x, t, cond):
    """A model function that tells labels, timesteps and inputs apart in every channel."""
    label = (1.0 + cond['label']).astype(x.dtype).reshape(-1, 1, 1, 1)
    step = t.astype(x.dtype).reshape(-1, 1, 1, 1)
    return jnp.concatenate([x * label + step, 2 * x - label], axis=-1)


def inputs(channels=4, dtype=jnp.float32):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, channels)), dtype)
    return x, jnp.array([5, 900]), {'label': jnp.array([3, 7])}


@pytest.mark.parametrize('channels, latent, guided',
                         [(3, 4, 3), ('all', 4, 4), (2, 4, 2), (3, 1, 1), (3, 3, 3)])
def test_only_the_chosen_noise_channels_are_guided(channels, latent, guided):
    """rtol: float32 with a scale of 4. A model of fewer channels than asked for never has its variance
    guided."""
    x, t, cond = inputs(latent)
    got = guide(model, 4.0, to_null, channels)(x, t, cond)
    with_label, without = model(x, t, cond), model(x, t, {'label': jnp.array([NULL, NULL])})
    want = without + 4.0 * (with_label - without)
    np.testing.assert_allclose(got[..., :guided], want[..., :guided], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(got[..., guided:], with_label[..., guided:])


def test_three_channels_are_the_default():
    args = inputs()
    np.testing.assert_array_equal(guide(model, 2.0, to_null)(*args), guide(model, 2.0, to_null, 3)(*args))


def test_scale_one_is_the_model_itself():
    assert guide(model, 1.0, to_null) is model
    assert guide(model, 1, to_null) is model


def test_one_call_of_twice_the_batch():
    seen = []

    def spy(x, t, cond):
        seen.append((x, t, cond['label']))
        return model(x, t, cond)

    x, t, cond = inputs()
    guide(spy, 2.0, to_null)(x, t, cond)
    (x2, t2, y2), = seen
    np.testing.assert_array_equal(x2, jnp.concatenate([x, x]))
    np.testing.assert_array_equal(t2, [5, 900, 5, 900])
    np.testing.assert_array_equal(y2, [3, 7, NULL, NULL])


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 20), st.integers(0, 2 ** 32 - 1))
def test_equal_predictions_make_guidance_the_identity(scale, seed):
    def indifferent(x, t, cond):
        return jnp.concatenate([jnp.sin(x), x], axis=-1)

    x = np.random.default_rng(seed).normal(size=(2, 3, 3, 4)).astype(np.float32)
    t, cond = jnp.array([5, 900]), {'label': jnp.array([3, 7])}
    np.testing.assert_array_equal(guide(indifferent, scale, to_null, 'all')(x, t, cond),
                                  indifferent(x, t, cond))


def test_scale_zero_is_the_null_prediction():
    x, t, cond = inputs()
    got = guide(model, 0.0, to_null, 'all')(x, t, cond)
    np.testing.assert_array_equal(got[..., :4], model(x, t, {'label': jnp.array([NULL, NULL])})[..., :4])


def test_bfloat16_predictions_are_combined_in_float32():
    x, t, cond = inputs(dtype=jnp.bfloat16)
    got = guide(model, 4.0, to_null)(x, t, cond)
    with_label = model(x, t, cond).astype(jnp.float32)
    without = model(x, t, {'label': jnp.array([NULL, NULL])}).astype(jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got[..., :3], (without + 4.0 * (with_label - without))[..., :3])


@pytest.mark.parametrize('channels', [0, -1, 'some', 2.5])
def test_channels_that_make_no_sense_are_refused(channels):
    with pytest.raises(UserError, match="'all'"):
        guide(model, 2.0, to_null, channels)


def counting(sizes):
    def spy(x, t, cond):
        jax.debug.callback(lambda x: sizes.append(len(x)), x)
        return model(x, t, cond)
    return spy


@pytest.mark.parametrize('t, inside', [(99, False), (100, True), (500, True), (700, True), (701, False)])
def test_outside_the_interval_the_model_is_itself_at_half_the_work(t, inside):
    x, _, cond = inputs()
    sizes, t = [], jnp.full(2, t)
    got = guide(counting(sizes), 3.0, to_null, 'all', interval=(100, 700))(x, t, cond)
    jax.effects_barrier()
    want = guide(model, 3.0, to_null, 'all')(x, t, cond) if inside else model(x, t, cond)
    np.testing.assert_allclose(got, want, rtol=1e-5)       # inside, another program: float32
    assert sizes == [4 if inside else 2]


def test_images_at_different_timesteps_are_guided_each_for_itself():
    x, t, cond = inputs()
    got = guide(model, 3.0, to_null, interval=(0, 100))(x, t, cond)        # t is 5 and 900
    np.testing.assert_allclose(got[0], guide(model, 3.0, to_null)(x, t, cond)[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], model(x, t, cond)[1], rtol=1e-5)     # null + 1·(label - null), rounded


def test_a_bfloat16_model_gives_one_dtype_inside_and_outside():
    x, t, cond = inputs(dtype=jnp.bfloat16)
    assert guide(model, 3.0, to_null, interval=(0, 100))(x, t, cond).dtype == jnp.float32


def test_the_interval_is_given_in_fractions_of_the_schedule():
    assert guided_timesteps((0.0, 1.0), 1000) is None
    assert guided_timesteps((0.0, 0.5), 1001) == (0.0, 500.0)
    for low, high in ((0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.5, 1.1), (float('nan'), 1.0)):
        with pytest.raises(UserError, match='guidance interval'):
            guided_timesteps((low, high), 1000)


@pytest.mark.parametrize('scale', [float('nan'), float('inf')])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(UserError, match='guidance scale'):
        guide(model, scale, to_null)
