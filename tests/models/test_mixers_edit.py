"""EDiT's attention against its formulas written out as loops in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, pulled
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.cost import network_macs
from lit_jax.models.mixers import build_mixer, edit
from lit_jax.models.mixers.linear import EPS, linear_attention
from lit_jax.models.network import Network
from lit_jax.plan.collectives import find_collectives
from lit_jax.runtime.errors import UserError
from lit_jax.training.mesh import make_mesh

WIDTH = 12


def build(heads=2, dtype=jnp.float32, width=WIDTH, **options):
    """(graphdef, params): every leaf random, so that gains and biases count."""
    graphdef, params = nnx.split(nnx.eval_shape(
        lambda: build_mixer({'name': 'edit', 'heads': heads, **options}, width, dtype=dtype,
                            rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(1)
    return graphdef, jax.tree.unflatten(structure, [0.3 * rng.normal(size=leaf.shape) for leaf in leaves])


def convolve(x, kernel, bias, stride=1, depthwise=False):
    """3x3 or 1x1 at a time, one pixel after the other; zeros outside. x [H, W, I]."""
    reach = kernel.shape[0] // 2
    rows, columns = (-(-side // stride) for side in x.shape[:2])
    y = np.zeros((rows, columns, len(bias)))
    for r in range(rows):
        for c in range(columns):
            y[r, c] = bias
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    row, column = stride * r + i, stride * c + j
                    if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                        tap = kernel[i + reach, j + reach]
                        y[r, c] += x[row, column] * tap if depthwise else x[row, column] @ tap
    return y


def group_norm(x, gain, bias, groups):
    y = np.empty_like(x)
    size = x.shape[-1] // groups
    for g in range(groups):
        part = x[..., g * size:(g + 1) * size]
        y[..., g * size:(g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return y * gain + bias


def reference(params, x, grid, heads, groups):
    """One image, [N, D] -> [N, D], every pair of a query and a key on its own."""
    width = x.shape[-1]
    flat = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    image = x.reshape(*grid, width)
    fusion = flat['fusion']
    hidden = convolve(image, fusion['compress']['kernel'], fusion['compress']['bias'])
    hidden = group_norm(hidden, fusion['norm']['gain'], fusion['norm']['bias'], groups)
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    fused = image + convolve(hidden, fusion['restore']['kernel'], fusion['restore']['bias'])
    q = np.maximum(fused.reshape(-1, width) @ flat['q']['kernel'].reshape(width, width) +
                   flat['q']['bias'].reshape(-1), 0)

    def compressed(part):
        y = image @ part['linear']['kernel'].reshape(width, width) + part['linear']['bias'].reshape(-1)
        return convolve(y, part['kernel'].reshape(3, 3, width), part['bias'].reshape(-1), 2,
                        True).reshape(-1, width)

    k, v = np.maximum(compressed(flat['k']), 0), compressed(flat['v'])
    o, size = np.zeros_like(q), width // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            scores = np.array([q[i, part] @ k[j, part] for j in range(len(k))])
            o[i, part] = (scores @ v[:, part] / len(k)) / (scores.mean() + EPS)
    return o @ flat['proj']['kernel'].reshape(width, width) + flat['proj']['bias']


def apply(graphdef, params, x, grid, dtype):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.promote_types(dtype, jnp.float32)), params)
    return jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, grid))(params, np.asarray(x, dtype))


@pytest.mark.parametrize('grid, heads, wide', [
    ((4, 6), 1, True), ((6, 4), 3, True), ((5, 3), 2, True), ((1, 7), 1, True), ((12, 12), 4, True),
    ((5, 3), 2, False), ((12, 12), 4, False)], ids=str)
def test_equals_the_loops(grid, heads, wide):
    """Odd sides too; (12, 12) with 4 heads goes through the state, the others through the map of queries and
    keys."""
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        graphdef, params = build(heads, dtype, ratio=0.5, groups=2)
        x = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], WIDTH))
        want = np.stack([reference(params, row, grid, heads, groups=2) for row in x])
        got = apply(graphdef, params, x, grid, dtype)
        assert got.dtype == dtype
        assert np.abs(got - want).max() <= (1e-12 if wide else 2e-5) * np.abs(want).max()


@pytest.mark.parametrize('tokens, channels', [((16, 4), 12), ((64, 16), 4)])
def test_both_orders_of_the_products_are_the_same(tokens, channels, x64):
    """Values and gradients; few keys and wide heads take the map, many keys the state."""
    n, m = tokens
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, size, 2, channels))) for size in (n, m, m))
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    text = str(jax.make_jaxpr(edit.compressed_attention)(q, k, v))
    assert (f'[2,2,{n},{m}]' in text) == (2 * n * m < (n + m) * (channels + 1))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-12),
                 *(pulled(fn, q, k, v) for fn in (edit.compressed_attention, linear_attention)))


@pytest.mark.parametrize('grid', [(6, 8), (5, 7), (1, 2)], ids=str)
def test_both_forms_of_the_strided_convolution_are_the_same(grid, x64):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(2, *grid, 2, 3))), jnp.asarray(rng.normal(size=(3, 3, 2, 3)))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-12),
                 *(pulled(fn, x, kernel) for fn in (edit._shifted, edit._convolved)))


def test_bfloat16_is_close_to_float32():
    graphdef, params = build(1, jnp.float32, width=64)
    half, _ = build(1, jnp.bfloat16, width=64)
    x = np.random.default_rng(0).normal(size=(2, 256, 64))
    want = np.asarray(apply(graphdef, params, x, (16, 16), jnp.float32))
    got = apply(half, params, x, (16, 16), jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.05 * np.abs(want).max()


def test_rows_cut_over_devices_change_nothing_and_send_no_tokens():
    """Values and gradients; GroupNorm sums over all rows, the convolutions exchange neighbours."""
    mesh, grid, heads = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'seq': 8}), (16, 12), 3
    graphdef, params = build(heads, width=48)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    x = normal(0, (2, grid[0] * grid[1], 48))

    def run(params, x):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, grid), params, x)
        return y, pull(jnp.sin(y))

    want = jax.jit(run)(params, x)
    cut = NamedSharding(mesh, P(None, 'seq', None))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(params, jax.device_put(x, cut))
        forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, grid), out_shardings=cut)
        found = find_collectives(forward.lower(params, jax.device_put(x, cut)).compile().as_text(), mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))
    kinds = {c.kind for c in found}
    assert kinds == {'all-reduce', 'collective-permute'}, kinds
    # All that is sent: sums, and single rows of the grid.
    assert sum(c.total_bytes for c in found if c.kind == 'collective-permute') < 0.5 * x.nbytes


@pytest.mark.parametrize('width, heads, published', [(384, 1, 5.91), (512, 1, 10.45), (768, 1, 23.39)])
def test_gmacs_are_the_published_ones(width, heads, published):
    """DyDi-LiT paper, tables 1 and 2: EDiT at 256 px, here as 9 blocks with an mlp of ratio 4."""
    network = Network({'family': 'dit', 'depth': 9, 'width': width, 'patch': 2, 'input_size': [32, 32],
                       'channels': 4, 'num_classes': 100, 'mixer': {'name': 'edit', 'heads': heads}})
    assert abs(network_macs(network) / 1e9 - published) <= 0.005 * published


def test_the_tokens_must_fill_the_grid():
    mixer = build_mixer({'name': 'edit', 'heads': 1}, WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match='12 tokens do not fill a grid of 4 x 4'):
        mixer(jnp.zeros((1, 12, WIDTH)), (4, 4))
    with pytest.raises(UserError, match='ratio 0.01 leaves no channels'):
        build_mixer({'name': 'edit', 'heads': 1, 'ratio': 0.01}, WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))
