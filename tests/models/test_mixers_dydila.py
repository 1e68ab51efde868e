"""DyDiLA against a reference written token by token in numpy float64, and what its options mean."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import made, normal, pulled, random_tree
from flax import nnx

from lit_jax.models.mixers import build_mixer
from lit_jax.models.mixers.dydila import measure
from lit_jax.models.mixers.reparam import fold
from lit_jax.models.network import Network
from lit_jax.models.probe import watching
from lit_jax.runtime.errors import UserError

GRID, WIDTH = (3, 5), 12
OPTIONS = [{}, {'heads': 3}, {'difference': 'maps'}, {'difference': 'none'},
           {'difference': 'none', 'projectors': 0},
           {'difference': 'none', 'projectors': 0, 'powers': 0, 'dwc': 'none'},
           {'normaliser': 'weights', 'heads': 2},
           {'separate_banks': True, 'projectors': 7, 'powers': 4, 'factors': 5},
           {'dwc': 'single', 'qkv_bias': True},
           {'difference': 'maps', 'normaliser': 'weights', 'separate_banks': True, 'heads': 2}]
BOTH_WIDTHS = OPTIONS[0], OPTIONS[-1]       # in float32 as well
EVERY_OPTION = pytest.mark.parametrize('options', OPTIONS, ids=str)


def build(options, dtype=jnp.float32, width=WIDTH):
    return build_mixer({'name': 'dydila', 'heads': 1, 'projectors': 3, **options}, width, dtype=dtype,
                       rngs=nnx.Rngs(0))


def drawn(options, dtype=jnp.float32, seed=0):
    """(graphdef, random float64 numpy parameters, tokens): banks and biases random too, exponents from about
    0.5 to 4."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(options, dtype)))
    rng = np.random.default_rng(seed)
    scale = {'gamma': 1.0, 'factor': 0.3, 'bias': 0.3}

    def draw(path, leaf):
        name = path[-1].key
        value = scale.get(name, 0.5) * rng.normal(size=leaf.shape)
        return (value + (2.0 if name == 'gamma' else 0)).astype(np.float32).astype(np.float64)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(params))
    return graphdef, params, rng.normal(size=(2, GRID[0] * GRID[1],
                                              WIDTH)).astype(np.float32).astype(np.float64)


# ------------------------------------------------------------------------------------------------------
# The reference: one token after the other, one sum after the other


def reference(p, x_BND, options, gaps):
    """The paper's equations 1, 2, 5 to 10 for each image; `gaps` collects how far each choice was from
    another."""
    o = {'heads': 1, 'projectors': 3, 'powers': 9, 'difference': 'tokens', 'normaliser': 'mean',
         'dwc': 'branches', 'separate_banks': False, **options}
    return np.stack([image(p, x_ND, o, gaps) for x_ND in x_BND])


def choose(x_D, kernel, gaps):
    logits = [sum(x_D[d] * kernel[d, c] for d in range(len(x_D))) for c in range(kernel.shape[1])]
    ordered = sorted(logits)
    if len(ordered) > 1:
        gaps.append(ordered[-1] - ordered[-2])
    return logits.index(ordered[-1])


def power_of(z_D, gamma):
    positive = [max(z, 0.0) + 1e-6 for z in z_D]
    powered = [z ** gamma for z in positive]
    length, own = (sum(z * z for z in values) ** 0.5 for values in (positive, powered))
    return np.array([z / own * length for z in powered])


def image(p, x_ND, o, gaps):
    n, d, heads = len(x_ND), WIDTH, o['heads']
    e = d // heads
    tokens = {name: np.zeros((n, d)) for name in ('query', 'key', 'query2', 'key2', 'value')}
    for i in range(n):
        if 'qkv' in p:
            for j, name in enumerate(('query', 'key', 'value')):
                tokens[name][i] = x_ND[i] @ p['qkv']['kernel'][:, j].reshape(d, d)
                if 'bias' in p['qkv']:
                    tokens[name][i] += p['qkv']['bias'][j].reshape(d)
        else:
            tokens['value'][i] = x_ND[i] @ p['value']['kernel'].reshape(d, d)
        if o['projectors']:
            for name, bank in (('query2', p['routed_q']), ('key2', p['routed_k'])):
                tokens[name][i] = x_ND[i] @ bank['kernel'][choose(x_ND[i], bank['router']['kernel'],
                                                                  gaps)].reshape(d, d)
    names = [name for name in ('query', 'key', 'query2', 'key2') if tokens[name].any()]
    for j, name in enumerate(names):
        for i in range(n):
            gamma = 3.0
            if o['powers']:
                gammas = np.log1p(np.exp(p['gamma'][j] if o['separate_banks'] else p['gamma']))
                gamma = gammas[choose(tokens[name][i], p[f'power_{name}']['kernel'], gaps)]
            tokens[name][i] = power_of(tokens[name][i], gamma)
    factors = {name: np.zeros(n) for name in ('query', 'key')}
    for j, name in enumerate({'tokens': ('query', 'key'), 'maps': ('query',), 'none': ()}[o['difference']]):
        for i in range(n):
            both = np.concatenate([tokens[name][i], tokens[f'{name}2'][i]])
            bank = p['factor'][j] if o['separate_banks'] else p['factor']
            factors[name][i] = bank[choose(both, p[f'difference_{name}']['kernel'], gaps)]
    output = np.zeros((n, d))
    for h in range(heads):
        part = slice(h * e, (h + 1) * e)
        q, k, q2, k2 = (tokens[name][:, part] for name in ([*names, *names])[:4])
        for i in range(n):
            total, weight = np.zeros(e), 0.0
            for m in range(n):
                if o['difference'] == 'tokens':
                    a = (q[i] - factors['query'][i] * q2[i]) @ (k[m] - factors['key'][m] * k2[m])
                else:
                    a = q[i] @ k[m] - (factors['query'][i] * (q2[i] @ k2[m]) if o['difference'] == 'maps'
                                       else 0)
                total += a / n * tokens['value'][m, part]
                weight += q[i] @ k[m] / n
            output[i, part] = total / (weight + 1e-6) if o['normaliser'] == 'weights' else total
    if o['dwc'] != 'none':
        output += convolved(p['dwc'], tokens['value'])
    return output @ p['proj']['kernel'].reshape(d, d) + p['proj']['bias']


def convolved(p, v_ND):
    """Three convolutions beside each other (or one), each on its own, and the bias."""
    rows, columns = GRID
    output = np.zeros_like(v_ND) + p['bias']
    for name, kernel in p.items():
        if name == 'bias':
            continue
        high, wide = kernel.shape[:2]
        for r in range(rows):
            for c in range(columns):
                for i in range(high):
                    for j in range(wide):
                        y, x = r + i - high // 2, c + j - wide // 2
                        if 0 <= y < rows and 0 <= x < columns:
                            output[r * columns + c] += kernel[i, j, 0] * v_ND[y * columns + x]
    return output


@EVERY_OPTION
def test_it_is_the_reference(options):
    graphdef, params, x = drawn(options)
    gaps = []
    want = reference(params, x, options, gaps)
    assert all(gap > 1e-4 for gap in gaps)           # no choice hangs on float32 rounding
    for wide, bound in ((False, 2e-5), (True, 1e-12))[options not in BOTH_WIDTHS:]:
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            module = drawn(options, dtype)[0]
            got = jax.jit(lambda p, x, module=module: nnx.merge(module, p)(x, GRID))(
                jax.tree.map(lambda a, dtype=dtype: np.asarray(a, dtype), params), np.asarray(x, dtype))
            assert got.dtype == dtype
            assert np.abs(got - want).max() / np.abs(want).max() <= bound


@EVERY_OPTION
def test_gradients_are_those_of_finite_differences(options, x64):
    """With literal choices, which small steps do not change: of everything but the routers, in a random
    direction."""
    graphdef, params, x = drawn({**options, 'router': 'frozen'}, jnp.float64)
    rng = np.random.default_rng(1)
    arguments = params, x
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), arguments)
    g = rng.normal(size=x.shape)

    loss = jax.jit(jax.value_and_grad(
        lambda arguments: (g * nnx.merge(graphdef, arguments[0])(arguments[1], GRID)).sum()))

    def at(step):
        return float(loss(jax.tree.map(lambda a, b: a + step * b, arguments, direction))[0])

    _, gradient = loss(arguments)
    slope = sum((np.asarray(a) * b).sum()
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    step = 1e-6
    np.testing.assert_allclose(slope, (at(step) - at(-step)) / (2 * step), rtol=1e-5)
    routers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient[0])
               if any(word in jax.tree_util.keystr(path) for word in ('router', 'power_', 'difference_'))]
    assert not any(np.any(leaf) for leaf in routers)


def test_straight_through_moves_every_router():
    graphdef, params, x = drawn({})
    gradient = jax.jit(jax.grad(
        lambda p: (nnx.merge(graphdef, p)(jnp.asarray(x, jnp.float32), GRID) ** 2).sum()))(
jax.tree.map(lambda a: jnp.asarray(np.float32(a)), params))
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


# ------------------------------------------------------------------------------------------------------
# Its parts


def test_exponents_begin_at_three_and_factors_at_a_hundredth():
    params = nnx.to_pure_dict(nnx.state(made(lambda: build({}))))
    np.testing.assert_allclose(np.log1p(np.exp(params['gamma'])), 3, rtol=1e-6)
    np.testing.assert_allclose(params['factor'], 0.01, rtol=1e-6)
    assert nnx.to_pure_dict(nnx.state(build({'factor_init': 0.8})))['factor'][0] == np.float32(0.8)


def test_the_power_sharpens_and_keeps_the_length():
    z = jnp.array([3.0, 1.0, -2.0, 0.0]).reshape(1, 1, 2, 2)
    out = measure(z, jnp.float32(3)).reshape(-1)
    np.testing.assert_allclose(jnp.linalg.norm(out), np.sqrt(10), rtol=1e-6)
    np.testing.assert_allclose(out[1] / out[0], 1 / 27, rtol=1e-5)
    np.testing.assert_allclose(measure(z, jnp.float32(1)), jax.nn.relu(z), atol=2e-6)


@pytest.mark.parametrize('size', [0.0, 1e-30, 1e3, 1e18])
@pytest.mark.parametrize('power', [1e-3, 3.0, 40.0])
def test_the_power_is_safe(size, power):
    """No token, however small, large or negative, and no exponent makes anything that is not a number."""
    z = size * normal(0, (1, 8, 1, 16)).at[0, 0].set(-1.0)
    y, gradients = pulled(measure, z, jnp.full((1, 8, 1, 1), power))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(jax.nn.relu(z) + 1e-6, axis=-1),
                               rtol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_it_shows_what_was_chosen():
    graphdef, params, x = drawn({'projectors': 7})
    mixer = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(np.float32(a)), params))

    def watched(x):
        with watching(*mixer.statistics, *mixer.routes) as seen:
            mixer(x, GRID)
        return dict(seen)

    seen = jax.jit(watched)(jnp.asarray(x, jnp.float32))
    assert all(len(values) == 1 for values in seen.values())
    assert all(seen[name][0].shape == () for name in mixer.statistics)
    for name in mixer.routes:
        assert seen[name][0].shape == x.shape[:2] and seen[name][0].dtype == jnp.int32
    for name, kernel in (('query', 'routed_q'), ('key', 'routed_k')):
        np.testing.assert_array_equal(seen[f'route/{name}'][0],
                                      (x @ params[kernel]['router']['kernel']).argmax(-1))
    shares = [np.bincount(np.asarray(seen[f'route/{name}'][0]).ravel(), minlength=7) / 30
              for name in ('query', 'key')]
    np.testing.assert_allclose(seen['routing/projection/largest'][0],
                               np.mean([share.max() for share in shares]), rtol=1e-6)
    with np.errstate(divide='ignore', invalid='ignore'):
        entropies = [-np.nansum(share * np.log(share)) / np.log(7) for share in shares]
    np.testing.assert_allclose(seen['routing/projection/entropy'][0], np.mean(entropies), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('stages', [(), ({'depth': 1}, {'depth': 2, 'mixer': {'factor_init': 0.5}})])
def test_folding_changes_nothing_but_the_parameters(stages):
    network = Network({'family': 'dit', 'depth': 3, 'width': 16, 'patch': 2, 'input_size': (8, 12),
                       'channels': 4, 'num_classes': 3, 'ffn': 'mix', 'stages': stages,
                       'mixer': {'name': 'dydila', 'heads': 1}})
    params = random_tree(network.abstract(), 0, 0.3)
    arch, folded = fold(network.arch, params)
    small = Network(arch)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, small.abstract())
    assert len(jax.tree.leaves(folded)) < len(jax.tree.leaves(params))
    arguments = (normal(1, (2, 8, 12, 4)), jnp.array([3, 900]),
                 {'label': jnp.array([0, 3])})
    got, want = jax.jit(small.apply)(folded, *arguments), jax.jit(network.apply)(params, *arguments)
    np.testing.assert_allclose(got, want, atol=2e-6 * float(np.abs(want).max()))
    again = fold(arch, folded)
    assert again[0] == arch and jax.tree.structure(again[1]) == jax.tree.structure(folded)


def test_folding_leaves_other_mixers_alone():
    arch = {'family': 'dit', 'depth': 1, 'width': 8, 'mixer': {'name': 'linear', 'heads': 1}}
    params = {'blocks': {'attn': {'dwc': {'kernel': jnp.ones((1, 5, 5, 1, 8)), 'bias': jnp.ones((1, 8))}}}}
    new_arch, new_params = fold(arch, params)
    assert new_arch == arch and jax.tree.structure(new_params) == jax.tree.structure(params)


@pytest.mark.slow
def test_memory_and_work_grow_with_the_tokens():
    """Bytes and floating-point operations of forward and backward; the grouped product hides in a loop, so it
    is off."""
    graphdef, params = nnx.split(build({'projectors': 0, 'difference': 'none'}, width=32))
    full, full_params = nnx.split(build({}, width=32))

    def measured(module, params, side):
        x = jax.ShapeDtypeStruct((1, side * side, 32), jnp.float32)
        program = jax.jit(jax.grad(lambda p, x: nnx.merge(module, p)(x, (side, side)).sum(),
                                   (0, 1))).lower(params, x).compile()
        return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()['flops']

    sides = (32, 128)                 # 1,024 and 16,384 tokens
    small, large = (measured(graphdef, params, side)[1] for side in sides)
    assert np.log(large / small) / np.log(16) <= 1.1
    small, large = (measured(full, full_params, side)[0] for side in sides)
    assert np.log(large / small) / np.log(16) <= 1.1


@pytest.mark.parametrize('options, says', [
    ({'projectors': -1}, 'projectors must be an integer from 0 on, got -1'),
    ({'powers': 2.5}, 'powers must be an integer from 0 on, got 2.5'),
    ({'factors': 0}, 'factors must be an integer from 1 on'),
    ({'projectors': True}, 'got True'),
    ({'difference': 'map'}, "unknown mixer.difference 'map'; known: tokens, maps, none"),
    ({'normaliser': 'sum'}, 'known: mean, weights'),
    ({'dwc': 'folded'}, 'known: branches, single, none'),
    ({'router': 'hard'}, 'known: straight_through, frozen'),
    ({'projectors': 0}, "with mixer.projectors 0 set it to 'none'"),
    ({'heads': 5}, '5 heads do not divide the width 12'),
])
def test_wrong_options_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        build(options)
