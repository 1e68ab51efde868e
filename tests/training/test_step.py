"""The train step: what it minimises, what it must not touch, and that layouts do not matter."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import random_tree
from ml_collections import ConfigDict
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.models.layers import BLOCK_OUTPUT
from lit_jax.models.t5 import T5Network
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import setup
from lit_jax.training.mesh import BatchLayout, make_mesh, state_shardings
from lit_jax.training.state import learning_rate_schedule, make_optimizer, new_state, update_ema
from lit_jax.training.step import draw_inputs, loss_terms, make_train_step

KEY = jax.random.key(3)
NETWORK = setup.build_network(tiny_recipe())      # knows that 10 is the null class


def random_like(abstract, seed=0, scale=0.2):
    return random_tree(abstract, seed, scale)


def fresh(params, optimizer):
    return jax.jit(lambda params: new_state(params, optimizer))(params)


def drawn(batch, objective, network):
    return jax.jit(lambda batch: draw_inputs(batch, KEY, objective, network))(batch)


def terms_of(params, teacher_params, inputs, network, objective):
    """The losses of a network that is its own teacher, with weights of its own."""
    return jax.jit(lambda *args: loss_terms(*args, network, network, objective)[0])(params, teacher_params,
                                                                                    inputs)


def parts(config, teacher_config=None, seed=0):
    """(step function, state, teacher params, batch) of a tiny recipe with weights of order one."""
    network, optimizer = setup.build_network(config), setup.build_optimizer(config)
    teacher = teacher_config and setup.build_network(teacher_config)
    step = make_train_step(network, optimizer, setup.build_objective(config), teacher)
    state = fresh(random_like(network.abstract(), seed), optimizer)
    rng = np.random.default_rng(0)
    batch = {'image': rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
             'label': rng.integers(0, 10, 16, np.int32)}
    return jax.jit(step), state, teacher and random_like(teacher.abstract(), 9), batch


@pytest.fixture(scope='module')
def plain():
    return parts(tiny_recipe())


@pytest.fixture(scope='module')
def distilled():
    """(state before, state after, metrics) of a step of a student with a teacher."""
    config = tiny_recipe('linear')
    config.teacher.lambda_noise, config.teacher.lambda_variance = 0.3, 0.07
    step, state, teacher, batch = parts(config, tiny_recipe('softmax'))
    return state, *step(state, {'teacher': teacher}, batch, KEY)


def test_total_is_the_weighted_sum_of_its_terms(distilled):
    _, _, metrics = distilled
    want = (metrics['loss/mse'] + metrics['loss/vb'] + 0.3 * metrics['loss/distill_noise']
            + 0.07 * metrics['loss/distill_variance'])
    assert metrics['loss/total'] == pytest.approx(float(want), rel=1e-6)
    assert metrics['loss/distill_noise'] > 0 and metrics['loss/distill_variance'] > 0


def test_blocks_learn_what_those_of_the_teacher_return():
    config = tiny_recipe('linear')
    config.teacher.lambda_blocks = 0.7
    network, teacher = setup.build_network(config), setup.build_network(tiny_recipe('softmax'))
    step, state, taught, batch = parts(config, tiny_recipe('softmax'))
    inputs = drawn(batch, setup.build_objective(config), network)

    def returned(network, params):
        seen = network.observe(params, inputs['x_t'], inputs['t'], inputs['cond'], (BLOCK_OUTPUT,))[1]
        return np.concatenate(seen[BLOCK_OUTPUT])

    own, wanted = returned(network, state['params']), returned(teacher, taught)
    each = [np.square(a - b).mean() / b.var() for a, b in zip(own, wanted, strict=True)]
    terms = jax.jit(lambda *args: loss_terms(*args, network, teacher, setup.build_objective(config))[0])(
        state['params'], taught, inputs)
    assert terms['distill_blocks'].mean() == pytest.approx(np.mean(each), rel=1e-5)
    _, metrics = step(state, {'teacher': taught}, batch, KEY)
    known = sum(metrics[f'loss/{name}'] * weight for name, weight in (
        ('mse', 1), ('vb', 1), ('distill_noise', 0.5), ('distill_variance', 0.05), ('distill_blocks', 0.7)))
    assert metrics['loss/total'] == pytest.approx(float(known), rel=1e-5)


def with_mixer(mixer):
    config = tiny_recipe()
    config.unlock()
    config.model.mixer = ConfigDict(mixer)
    config.lock()
    return config


def test_a_mixers_own_loss_is_added_with_its_weight():
    config = with_mixer({'name': 'moh', 'heads': 4, 'shared': 0, 'routed': 1})
    config.train.balance_weight = 0.5
    step, state, _, batch = parts(config)
    after, metrics = step(state, {}, batch, KEY)
    assert metrics['loss/balance'] > 0.9      # 1 where all heads are used alike, more where they are not
    assert metrics['loss/total'] == pytest.approx(float(metrics['loss/mse'] + metrics['loss/vb'] +
                                                        0.5 * metrics['loss/balance']))
    assert 'quarter/balance' not in metrics and metrics['grad/bad_leaf'] == -1


@pytest.mark.slow
def test_layers_that_route_show_their_statistics():
    step, state, _, batch = parts(with_mixer({'name': 'dydila', 'heads': 1}))
    _, metrics = step(state, {}, batch, KEY)
    assert 0 <= metrics['routing/projection/entropy'] <= 1 and 1 / 3 <= metrics[
        'routing/projection/largest'] <= 1


def test_a_model_without_a_layer_that_routes_has_no_such_loss():
    step, state, _, batch = parts(with_mixer({'name': 'moh', 'heads': 4, 'shared': 4, 'routed': 0}))
    assert 'loss/balance' not in step(state, {}, batch, KEY)[1]


def test_quarters_sum_to_the_mean(plain):
    step, state, _, batch = plain
    _, metrics = step(state, {}, batch, KEY)
    sums, counts = metrics['quarter/mse']
    assert counts.sum() == 16
    assert sums.sum() / 16 == pytest.approx(float(metrics['loss/mse']), rel=1e-5)


def test_no_gradient_reaches_the_teacher():
    config, teacher_config = tiny_recipe('linear'), tiny_recipe('softmax')
    student, teacher = setup.build_network(config), setup.build_network(teacher_config)
    objective = setup.build_objective(config)
    _, state, teacher_params, batch = parts(config, teacher_config)
    inputs = drawn(batch, objective, NETWORK)

    def total(student_params, teacher_params):
        terms, _ = loss_terms(student_params, teacher_params, inputs, student, teacher, objective)
        return sum(value.sum() for value in terms.values())

    of_student, of_teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(state['params'], teacher_params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_teacher))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(of_student))


def test_the_state_holds_nothing_of_the_teacher(distilled):
    state, after, _ = distilled
    assert set(after) == {'params', 'ema', 'opt', 'step'}
    of_params = {leaf.shape for leaf in jax.tree.leaves(state['params'])}
    assert {leaf.shape for leaf in jax.tree.leaves(after['opt'])} <= of_params | {()}
    assert not any('qkv' in jax.tree_util.keystr(path)
                   for path, _ in jax.tree_util.tree_leaves_with_path(after))


def test_teacher_and_student_see_the_same_inputs():
    """A student that is its own teacher has no distillation loss, dropped labels included."""
    config = tiny_recipe('softmax', label_dropout=0.5)
    network, objective = setup.build_network(config), setup.build_objective(config)
    _, state, _, batch = parts(config)
    inputs = drawn(batch, objective, NETWORK)
    assert (inputs['cond']['label'] == 10).any() and (inputs['cond']['label'] != 10).any()
    terms = terms_of(state['params'], state['params'], inputs, network, objective)
    assert (terms['distill_noise'] == 0).all() and (terms['distill_variance'] == 0).all()


def test_a_flow_distils_its_velocity():
    """loss = mse + λ1·(velocity of teacher and student)², at times of a flow; the unused half stays."""
    config, teacher = (recipes.flow(tiny_recipe(mixer)) for mixer in ('linear', 'softmax'))
    config.teacher.lambda_noise = 0.3
    step, state, teacher_params, batch = parts(config, teacher)
    inputs = drawn(batch, setup.build_objective(config), NETWORK)
    assert inputs['t'].dtype == jnp.float32 and 0 <= inputs['t'].min() and inputs['t'].max() <= 1
    before = np.asarray(state['params']['final_layer']['linear']['kernel'])
    after, metrics = step(state, {'teacher': teacher_params}, batch, KEY)
    assert set(metrics) == {'loss/mse', 'loss/distill_velocity', 'loss/total', 'quarter/mse',
                            'quarter/distill_velocity', 'grad/norm', 'grad/bad_leaf'}
    want = metrics['loss/mse'] + 0.3 * metrics['loss/distill_velocity']
    np.testing.assert_allclose(metrics['loss/total'], want, rtol=1e-6)
    assert metrics['grad/norm'] > 0 and metrics['quarter/mse'][1].sum() == 16
    changed = np.asarray(after['params']['final_layer']['linear']['kernel']) != before
    unused = np.arange(changed.shape[-1]) % 2 >= 1      # of one channel
    assert changed[:, ~unused].any() and not changed[:, unused].any()


def test_a_teacher_of_another_size_works():
    teacher_config = tiny_recipe('softmax')
    teacher_config.model.update({'width': 48, 'depth': 3})
    step, state, teacher, batch = parts(tiny_recipe('linear'), teacher_config)
    after, metrics = step(state, {'teacher': teacher}, batch, KEY)
    assert np.isfinite(metrics['loss/total']) and after['step'] == 1


def test_accumulation_gives_the_gradient_of_the_whole_batch(distilled):
    _, after, whole = distilled
    config = tiny_recipe('linear', accumulate=4)
    config.teacher.lambda_noise, config.teacher.lambda_variance = 0.3, 0.07
    step, state, teacher, batch = parts(config, tiny_recipe('softmax'))
    split_after, split = step(state, {'teacher': teacher}, batch, KEY)
    for name in ('loss/total', 'loss/mse', 'grad/norm'):
        assert split[name] == pytest.approx(float(whole[name]), rel=1e-5)
    np.testing.assert_allclose(split['quarter/vb'][0], whole['quarter/vb'][0], rtol=1e-5)
    # Adam's first update is a sign: compare where the gradient is not within rounding of zero.
    gaps = [np.abs(a - b).mean()
            for a, b in zip(jax.tree.leaves(after['params']), jax.tree.leaves(split_after['params']),
                            strict=True)]
    assert max(gaps) < 1e-4


@pytest.mark.slow
def test_gradients_of_mixed_layouts_equal_one_device():
    """Relative 1e-5 in float32: only the order of the sums over the batch differs."""
    config, teacher_config = tiny_recipe('linear'), tiny_recipe('softmax')
    step, state, teacher, batch = parts(config, teacher_config)
    _, want = step(state, {'teacher': teacher}, batch, KEY)
    for sizes in ({'data': 8, 'fsdp': 1, 'tensor': 1, 'seq': 1},
                  {'data': 2, 'fsdp': 2, 'tensor': 2, 'seq': 1}):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            archs = [recipes.architecture(recipe) for recipe in (config, teacher_config)]
            sharded = jax.device_put(state, state_shardings(state, mesh, archs[0]))
            placed_teacher = jax.device_put(teacher, state_shardings(teacher, mesh, archs[1]))
            _, got = step(sharded, {'teacher': placed_teacher},
                          BatchLayout(mesh, len(batch['label'])).place(batch), KEY)
        for name in ('loss/total', 'loss/distill_noise', 'grad/norm'):
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5), (sizes, name)


def test_label_dropout_uses_the_null_class_at_its_rate():
    objective = setup.build_objective(tiny_recipe(label_dropout=0.1))
    batch = {'image': np.zeros((20_000, 1, 1, 1), np.float32), 'label': np.zeros(20_000, np.int32)}
    inputs = drawn(batch, objective, NETWORK)
    assert (inputs['cond']['label'] == 10).mean() == pytest.approx(0.1, abs=0.01)   # five standard deviations
    assert inputs['t'].min() == 0 and inputs['t'].max() == 999


def test_the_scale_of_the_latent_space_multiplies_the_data():
    config = tiny_recipe()
    config.latent.scale = 3.0
    batch = {'image': np.ones((2, 8, 8, 1), np.float32), 'label': np.zeros(2, np.int32)}
    assert (drawn(batch, setup.build_objective(config), NETWORK)['x0'] == 3).all()


def test_a_non_finite_gradient_names_its_leaf(plain):
    step, state, _, batch = plain
    batch = {**batch, 'image': batch['image'].copy()}
    batch['image'][3, 0, 0, 0] = np.nan
    _, metrics = step(state, {}, batch, KEY)
    assert not np.isfinite(metrics['loss/total'])
    assert list(named_leaves(state['params']))[int(metrics['grad/bad_leaf'])] == 'blocks/adaLN/bias'
    _, metrics = step(state, {}, {**batch, 'image': np.zeros_like(batch['image'])}, KEY)
    assert metrics['grad/bad_leaf'] == -1


def test_ema_and_its_warm_up():
    ema, params = {'a': jnp.zeros(())}, {'a': jnp.ones(())}
    assert update_ema(ema, params, 0, decay=0.9, warmup=False)['a'] == pytest.approx(0.1)
    assert update_ema(ema, params, 0, decay=0.9999, warmup=True)['a'] == pytest.approx(0.9)
    assert update_ema(ema, params, 10 ** 6, decay=0.9, warmup=True)['a'] == pytest.approx(0.1)


def test_warm_up_of_the_learning_rate_ends_at_its_value():
    optimizer = make_optimizer(learning_rate=0.1, warmup_steps=4)
    params = {'a': jnp.zeros(1)}
    state, moved = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update({'a': jnp.ones(1)}, state, params)
        moved.append(-float(updates['a'][0]))
    # Adam rounds in float32
    np.testing.assert_allclose(moved, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=5e-5)


@pytest.mark.parametrize('warmup', [0, 2])
def test_the_rate_falls_in_the_last_steps(warmup):
    rate = learning_rate_schedule(0.1, warmup, 4, 8)
    first = [0.05, 0.1] if warmup else [0.1, 0.1]
    np.testing.assert_allclose([rate(step) for step in range(8)], [*first, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025],
                               rtol=1e-6)
    assert learning_rate_schedule(0.1) == 0.1


def test_clipping_bounds_the_gradient_before_adam():
    optimizer = make_optimizer(learning_rate=0.1, clip_norm=1.0)
    params = {'a': jnp.zeros(1)}
    _, state = optimizer.update({'a': 100 * jnp.ones(1)}, optimizer.init(params), params)
    assert optax.tree.norm(state[1][0].mu) == pytest.approx(0.1)    # (1 - beta1) · clipped gradient




def caption_recipe(mixer='linear'):
    """A text-to-image recipe on pixels, as small as the others."""
    config = recipes.shapes(recipes.default())
    config.text.update({'channels': 12, 'tokens': 5})
    config.data.image_size = 8
    config.model.update({'depth': 2, 'width': 32, 'patch': 2, 'cross_heads': 2})
    config.model.mixer = {'softmax': recipes.softmax_mixer, 'linear': recipes.linear_mixer}[mixer](2)
    return config


NULL = np.full((5, 12), 0.25, np.float32)      # features of the empty caption


def caption_batch(rows=16):
    rng = np.random.default_rng(0)
    return {'image': rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
            'text': rng.normal(size=(rows, 5, 12)).astype(np.float32),
            'text_mask': np.tile(np.array([1, 1, 1, 0, 0], np.int32), (rows, 1))}


def test_captions_are_dropped_for_teacher_and_student_alike():
    config = caption_recipe('softmax')
    config.train.label_dropout = 0.5
    network, objective = setup.build_network(config), setup.build_objective(config)
    batch, params = caption_batch(), random_like(network.abstract())
    inputs = draw_inputs(batch, KEY, objective, network, null_text=NULL)
    dropped = (inputs['cond']['text'] == NULL).all((1, 2))
    assert dropped.any() and not dropped.all()
    np.testing.assert_array_equal(inputs['cond']['text'][~dropped], batch['text'][~dropped])
    np.testing.assert_array_equal(inputs['cond']['text_mask'], batch['text_mask'])
    terms, _ = loss_terms(params, params, inputs, network, network, objective)
    assert (terms['distill_noise'] == 0).all()


def test_tokens_are_encoded_in_the_step_as_features_would_be():
    config = caption_recipe()
    network, objective = setup.build_network(config), setup.build_objective(config)
    encoder = T5Network({'vocab': 20, 'width': 12, 'layers': 1, 'heads': 2, 'head_dim': 6, 'ffn': 16})
    weights, batch = jax.jit(encoder.init)(jax.random.key(5)), caption_batch()
    tokens = np.random.default_rng(1).integers(3, 20, (16, 5), np.int32)
    features = {**batch, 'text': np.asarray(jax.jit(encoder.apply)(weights, tokens, batch['text_mask']))}
    optimizer = setup.build_optimizer(config)
    state = fresh(random_like(network.abstract()), optimizer)
    step = jax.jit(make_train_step(network, optimizer, objective))
    _, want = step(state, {'null_text': NULL}, features, KEY)
    batch = {**batch, 'tokens': tokens}
    del batch['text']
    step = jax.jit(make_train_step(network, optimizer, objective, text_encoder=encoder))
    _, got = step(state, {'text_encoder': weights, 'null_text': NULL}, batch, KEY)
    assert float(got['loss/total']) == pytest.approx(float(want['loss/total']), rel=1e-5)
