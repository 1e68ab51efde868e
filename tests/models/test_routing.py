"""The routed product in each of its forms against all products of all tokens, and the two readings of
`argmax`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import made, normal
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.mixers.grouped import FORMS, grouped_product, sort_rows
from lit_jax.models.mixers.routing import Route, RoutedLinear, Router, entropy, routed_product
from lit_jax.plan.collectives import find_collectives, format_collectives
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh

ALL_FORMS = pytest.mark.parametrize('form', [None, *FORMS])


def dense(x_MD, kernel_PDF, index_M):
    """All products of all rows, and a one for the right one."""
    chosen = jax.nn.one_hot(index_M, len(kernel_PDF), dtype=x_MD.dtype)
    return jnp.einsum('md,pdf,mp->mf', x_MD, kernel_PDF, chosen, precision='highest')


def case(m, choices, width=(5, 7), dtype=jnp.float64, index=None):
    x, kernel, g = (normal(m + i, shape, dtype)
                    for i, shape in enumerate(((m, width[0]), (choices, *width), (m, width[1]))))
    index = np.random.default_rng(m).integers(0, choices, m) if index is None else index
    return x, kernel, jnp.asarray(index, jnp.int32), g


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(product, x, kernel, index, g):
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, index), x, kernel)
    return y, *pull(g)


@functools.cache
def of_all_products(*of_case):
    return value_and_gradients(dense, *case(*of_case[:2], index=of_case[2]))


@ALL_FORMS
@pytest.mark.parametrize('m, choices, index', [
    (1, 3, None), (37, 1, None), (100, 7, None), (1000, 5, None), (60, 4, (2,) * 60), (70, 9, (0, 8) * 35)],
    ids=['one row', 'one matrix', 'small', 'large', 'all to one', 'most unused'])
def test_values_and_gradients_are_those_of_all_products(form, m, choices, index, x64):
    got = value_and_gradients(functools.partial(grouped_product, form=form), *case(m, choices, index=index))
    for a, b in zip(got, of_all_products(m, choices, index), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize('m, choices', [(1, 1), (50, 3), (257, 7)])
@pytest.mark.parametrize('rows', [8, 32])
def test_each_block_belongs_to_one_matrix(m, choices, rows):
    index = np.random.default_rng(m).integers(0, choices, m)
    blocks = jax.device_get(jax.jit(sort_rows, static_argnums=(1, 2))(index, choices, rows))
    source = blocks.source.reshape(-1, rows)
    assert len(source) == len(blocks.owner)
    np.testing.assert_array_equal(blocks.source[blocks.place], np.arange(m))
    assert sorted(blocks.source[blocks.source < m]) == list(range(m))
    for block, owner in zip(source, blocks.owner, strict=True):
        assert (index[block[block < m]] == owner).all()
    filled = (source < m).any(1)
    assert filled[:blocks.used].all() and not filled[blocks.used:].any()


@ALL_FORMS
def test_it_works_inside_jit_scan_and_remat(form):
    x, kernels, index, _ = case(64, 3, (6, 6), jnp.float32)
    kernels = jnp.stack([kernels, 2 * kernels]) / 4

    def loss(kernels, product):
        step = jax.checkpoint(lambda x, kernel: (jnp.tanh(product(x, kernel, (index + 1) % 3)), None))
        return (jax.lax.scan(step, x, kernels)[0] ** 2).sum()

    got = jax.jit(jax.grad(lambda k: loss(k, lambda *args: grouped_product(*args, form))))(kernels)
    np.testing.assert_allclose(got, jax.jit(jax.grad(lambda k: loss(k, dense)))(kernels), rtol=1e-4,
                               atol=1e-5)


@ALL_FORMS
def test_bfloat16_sums_in_float32(form):
    # 4096 products of one: a bfloat16 sum would stop growing at 256.
    x, kernel = jnp.ones((24, 4096), jnp.bfloat16), jnp.ones((2, 4096, 3), jnp.bfloat16)
    y, dx, dkernel = value_and_gradients(functools.partial(grouped_product, form=form), x, kernel,
                                         jnp.arange(24) % 2, jnp.ones((24, 3), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and (y == 4096).all()
    assert dx.dtype == dkernel.dtype == jnp.bfloat16
    assert (dx == 3).all() and (dkernel == 12).all()


def test_memory_does_not_hold_all_products():
    m, d, choices = 4096, 64, 16
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, d), (choices, d, d), (m, d))]

    def both(x, kernel, g):
        index = (jnp.abs(x[:, 0]) * 100).astype(jnp.int32) % choices
        y, pull = jax.vjp(lambda x, kernel: grouped_product(x, kernel, index), x, kernel)
        return y, pull(g)

    memory = jax.jit(both).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert memory < 8 * m * d * 4           # `dense` has 16 of them in its forward pass alone


# ------------------------------------------------------------------------------------------------------
# Routers


def router_of(gradient, width=6, choices=4, dtype=jnp.float32):
    return made(lambda: Router(width, choices, gradient=gradient, dtype=dtype, rngs=nnx.Rngs(0)))


def test_a_router_takes_the_largest_logit():
    router, x = router_of('straight_through'), normal(1, (2, 5, 6))
    route = jax.jit(router)(x)
    want = np.asarray(x @ router.kernel[...]).argmax(-1)
    np.testing.assert_array_equal(route.index_BN, want)
    np.testing.assert_array_equal(route.weights_BNP, np.eye(4)[want])       # exactly one, exactly zero
    assert (route.gate() == 1).all()
    np.testing.assert_array_equal(route.pick(jnp.array([3.0, 5, 7, 9])), np.array([3.0, 5, 7, 9])[want])
    np.testing.assert_allclose(route.usage(), np.bincount(want.ravel(), minlength=4) / 10)


def test_a_router_of_two_parts_sees_them_side_by_side():
    router = made(lambda: Router(6, 4, parts=2, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert router.kernel.shape == (12, 4)
    x, y = normal(1, (2, 3, 5, 2, 3))          # tokens of two heads
    both = jnp.concatenate([x.reshape(3, 5, 6), y.reshape(3, 5, 6)], -1)
    np.testing.assert_array_equal(jax.jit(router)(x, y).index_BN, (both @ router.kernel[...]).argmax(-1))


def test_straight_through_gives_a_number_the_gradient_of_the_softmax(x64):
    router, x = router_of('straight_through',
                          dtype=jnp.float64), normal(1, (2, 5, 6), jnp.float64)
    graphdef, params = nnx.split(router)
    bank, g = jnp.array([0.5, -1, 2, 3]), normal(2, (2, 5), jnp.float64)

    def hard(params, bank):
        return (g * nnx.merge(graphdef, params)(x).pick(bank)).sum()

    def soft(params, bank):
        return (g * (jax.nn.softmax(x @ params['kernel'][...]) @ bank)).sum()

    of_params, of_bank = jax.jit(jax.grad(hard, (0, 1)))(params, bank)
    np.testing.assert_allclose(of_params['kernel'][...], jax.jit(jax.grad(soft))(params, bank)['kernel'][...],
                               atol=1e-7)          # the parameters are float32
    # The bank has the gradient of the hard choice: each number that of the tokens that took it.
    index = np.asarray(jax.jit(router)(x).index_BN)
    np.testing.assert_allclose(of_bank, [np.asarray(g)[index == i].sum() for i in range(4)], atol=1e-12)


@pytest.mark.parametrize('gradient', ['straight_through', 'frozen'])
def test_gradients_of_the_routed_projection_are_those_of_all_projections(gradient, x64):
    """Against gates that are one or zero, and whose derivative is that of the probability where they are
    one."""
    layer = made(lambda: RoutedLinear(6, (2, 3), 4, gradient=gradient, dtype=jnp.float64, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(layer)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.to_pure_dict(params))
    x = normal(1, (2, 15, 6), jnp.float64)
    g = normal(2, (2, 15, 2, 3), jnp.float64)

    def ours(params, x):
        return nnx.merge(graphdef, params)(x)[0]

    def all_of_them(params, x):
        logits = x @ params['router']['kernel']
        chosen = jax.nn.one_hot(logits.argmax(-1), 4)
        soft = jax.nn.softmax(logits)
        gates = chosen * (1 + soft
                          - jax.lax.stop_gradient(soft)) if gradient == 'straight_through' else chosen
        return jnp.einsum('bnd,pdke,bnp->bnke', x, params['kernel'], gates)

    def pulled(f):
        y, pull = jax.vjp(f, params, x)
        return y, pull(g)

    (y, got), (want, expected) = (jax.jit(pulled, static_argnums=0)(f) for f in (ours, all_of_them))
    np.testing.assert_allclose(y, want, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, expected)
    assert np.any(got[0]['router']['kernel']) == (gradient == 'straight_through')


def test_an_unknown_router_is_refused():
    with pytest.raises(UserError, match="unknown router 'gumbel'; known: straight_through, frozen"):
        router_of('gumbel')


def test_entropy_says_how_evenly_choices_are_used():
    np.testing.assert_allclose(entropy(jnp.full(5, 0.2)), 1, rtol=1e-6)
    np.testing.assert_allclose(entropy(jnp.array([0.5, 0.5, 0, 0])), 0.5, rtol=1e-6)
    assert entropy(jnp.array([0, 1.0, 0])) == 0 and entropy(jnp.ones(1)) == 0


def test_usage_has_no_gradient():
    weights = jnp.asarray(np.random.default_rng(0).random((1, 4, 3)))
    gradient = jax.jit(jax.grad(lambda w: Route(jnp.zeros((1, 4), jnp.int32), w).usage().max()))(weights)
    assert not np.any(gradient)


# ------------------------------------------------------------------------------------------------------
# On a mesh


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (1, 2, 2, 2)],
                         ids=['data', 'fsdp', 'seq', 'mixed'])
def test_on_a_mesh_each_device_sorts_its_own_tokens(sizes):
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    x, g, kernel = normal(0, (8, 32, 12)), normal(1, (8, 32, 2, 6)), normal(2, (5, 12, 2, 6))
    index = jnp.asarray(np.random.default_rng(3).integers(0, 5, (8, 32)), jnp.int32)

    def both(x, kernel, index, g):
        y, pull = jax.vjp(lambda x, kernel: routed_product(x, kernel, index), x, kernel)
        return y, *pull(g)

    want = jax.jit(both)(x, kernel, index, g)
    tokens, heads = P(('data', 'fsdp'), 'seq'), P(None, None, 'tensor', None)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in (
        (x, tokens), (kernel, heads), (index, tokens), (g, P(*tokens, 'tensor', None)))]
    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(*placed).compile()
    for a, b in zip(program(*placed), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    found = find_collectives(program.as_text(), mesh)
    # Tokens stay where they are: sums over devices are those of the gradients by the matrices and, with
    # `tensor`, by x.
    assert {c.kind for c in found} == {'all-reduce'}, format_collectives(found)
