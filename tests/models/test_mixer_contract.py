"""What every token mixer must do: one table of options, and the same tests for each of them.

A new mixer of MIXERS is added to CASES; the last test fails until it is.
"""
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, random_tree
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.arch import check_partition, find_leaf, find_owner
from lit_jax.models.macs import macs_by_parameter
from lit_jax.models.mixers import MIXERS, build_mixer
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training.mesh import make_mesh, state_shardings

ROOT = Path(__file__).parents[2]
WIDTH = 32
CASES = {
    'softmax': {'name': 'softmax', 'heads': 4},
    'kv': {'name': 'softmax', 'heads': 4, 'compress': 2},
    'linear': {'name': 'linear', 'heads': 2},
    'edit': {'name': 'edit', 'heads': 1},
    'edit heads': {'name': 'edit', 'heads': 2},
    'moh': {'name': 'moh', 'heads': 4, 'shared': 2, 'routed': 1},
    'gla': {'name': 'gla', 'heads': 2},
    'sana': {'name': 'sana', 'heads': 1},
    'sana heads': {'name': 'sana', 'heads': 2},
    'dydila': {'name': 'dydila', 'heads': 1},
    'dydila heads': {'name': 'dydila', 'heads': 2, 'projectors': 5, 'difference': 'maps'},
}
FFN = {'sana': 'mix', 'dydila': 'mix', 'gla': 'swiglu'}       # the others' is the plain mlp
QUADRATIC = ('softmax', 'kv', 'moh')        # cost grows with the square of the tokens
# Relative L2 error of bfloat16; where tokens choose, a few of them choose otherwise for the rounding.
ROUNDING = {'moh': 0.1, 'dydila': 0.2, 'dydila heads': 0.2}
LAYOUTS = {'data': (8, 1, 1, 1), 'fsdp': (1, 8, 1, 1), 'tensor': (4, 1, 2, 1), 'seq': (2, 1, 1, 4),
           'mixed': (1, 2, 2, 2)}
# What cannot be cut: (case, axis). One head cannot be shared out; a scan over all tokens has no rows to give
# away.
REFUSED = {(case, 'tensor') for case in ('edit', 'sana', 'dydila')} | {('gla', 'seq')}
EVERY_CASE = pytest.mark.parametrize('case', CASES)


def mixer_of(case, dtype=jnp.float32):
    """(graphdef, random parameters) of the mixer alone."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: build_mixer(CASES[case], WIDTH, dtype=dtype, rngs=nnx.Rngs(0))))
    return graphdef, random_tree(nnx.to_pure_dict(state))


def network_of(case, **options):
    return Network({'family': 'dit', 'depth': 2, 'width': WIDTH, 'patch': 1, 'input_size': (8, 12),
                    'channels': 4, 'num_classes': 3, 'mixer': CASES[case],
                    'ffn': FFN.get(CASES[case]['name'], 'mlp')}, **options)


def batch(size=8, dtype=jnp.float32):
    x = normal(1, (size, 8, 12, 4), dtype)
    return x, jnp.linspace(3, 990, size), {'label': jnp.arange(size) % 4}


def sizes_of(layout):
    return dict(zip(('data', 'fsdp', 'tensor', 'seq'), LAYOUTS[layout], strict=True))


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('grid', [(4, 4), (2, 8), (10, 6)], ids=str)
@EVERY_CASE
def test_tokens_in_and_tokens_out(case, grid, dtype):
    graphdef, params = mixer_of(case, dtype)
    x = jax.ShapeDtypeStruct((3, grid[0] * grid[1], WIDTH), dtype)
    y = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x, grid), params, x)
    assert y.shape == x.shape and y.dtype == dtype


@EVERY_CASE
def test_bfloat16_is_close_to_float32(case):
    x = normal(0, (4, 96, WIDTH)).astype(jnp.bfloat16)
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = mixer_of(case, dtype)
        outputs.append(jax.jit(lambda p, x, graphdef=graphdef: nnx.merge(graphdef, p)(x, (8, 12)))(
            params, x.astype(dtype)))
    assert relative(outputs[1], outputs[0]) <= ROUNDING.get(case, 2e-2)


@EVERY_CASE
@pytest.mark.slow
def test_forward_mode_is_the_difference_and_the_transpose_of_reverse_mode(case, x64):
    """Directional derivatives in float64; 288 tokens are more than one chunk of softmax attention."""
    # A straight-through router pretends to have a derivative, which differences do not see.
    options = CASES[case] | ({'router': 'frozen'} if CASES[case]['name'] == 'dydila' else {})
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: build_mixer(options, WIDTH, dtype=jnp.float64, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(7)
    point = random_tree(nnx.to_pure_dict(state)), rng.normal(size=(1, 288, WIDTH))
    point = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), point)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), point)

    @jax.jit
    def derivatives(point, direction, cotangent):
        def call(point):
            return nnx.merge(graphdef, point[0])(point[1], (16, 18))

        _, forward = jax.jvp(call, (point,), (direction,))
        (backward,) = jax.vjp(call, point)[1](cotangent)
        moved = jax.lax.map(lambda step: call(jax.tree.map(lambda a, b: a + step * b, point, direction)),
                            1e-7 * jnp.asarray([1, -1]))      # small, not to cross kinks and choices
        return forward, backward, (moved[0] - moved[1]) / 2e-7

    cotangent = jnp.asarray(rng.normal(size=point[1].shape))
    forward, backward, difference = derivatives(point, direction, cotangent)
    assert relative(forward, difference) < 1e-6
    pulled = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (backward, direction)), strict=True))
    assert abs(jnp.vdot(cotangent, forward) - pulled) < 1e-9 * jnp.linalg.norm(cotangent) * jnp.linalg.norm(
        forward)


def value_and_gradient(network, params, arguments):
    def loss(params):
        y = network.apply(params, *arguments)
        return (y ** 2).mean(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return y, gradient


@functools.cache
def on_one_device(case):
    network = network_of(case)
    params = random_tree(network.abstract())
    return jax.jit(functools.partial(value_and_gradient, network))(params, batch())


def assert_same(got, want, outputs=2e-5, gradients=1e-3):
    """Sums in another order; gradients of leaves far from the output amplify it."""
    assert relative(got[0], want[0]) <= outputs
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want[1]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]),
                            strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=gradients, atol=gradients * scale,
                                   err_msg=jax.tree_util.keystr(path))


@EVERY_CASE
@pytest.mark.slow
def test_the_unrolled_stack_is_the_scanned_one(case):
    network = network_of(case, scan_layers=False, remat='full')
    got = jax.jit(functools.partial(value_and_gradient, network))(random_tree(network.abstract()), batch())
    assert_same(got, on_one_device(case))


def mesh_program(case, sizes):
    """A function without arguments: output and gradient on a mesh of so many devices, not waited for."""
    network, mesh = network_of(case), make_mesh(sizes)
    params = random_tree(network.abstract())
    shardings = state_shardings(network.abstract(), mesh, network.arch)
    places = NamedSharding(mesh, P(('data', 'fsdp'), 'seq')), *[NamedSharding(mesh, P(('data', 'fsdp')))] * 2
    x, t, cond = batch()
    arguments = tuple(jax.device_put(a, place)
                      for a, place in zip((x, t, cond['label']), places, strict=True))
    program = jax.jit(lambda p, x, t, label: value_and_gradient(network, p, (x, t, {'label': label})),
                      out_shardings=(None, shardings))

    def run():
        with jax.set_mesh(mesh):
            return program(jax.device_put(params, shardings), *arguments)
    return run


@pytest.mark.parametrize('layout',
                         [pytest.param(name, marks=[] if name == 'mixed' else pytest.mark.slow)
                          for name in LAYOUTS])
@pytest.mark.parametrize('case', [
    # These compile for long: routed products on a mesh are in test_routing.py, sums in the linear case.
    pytest.param(name, marks=pytest.mark.slow if name in ('dydila heads', 'sana heads', 'edit heads') else [])
    for name in CASES])
def test_eight_devices_give_what_one_gives_or_say_why_not(case, layout):
    sizes = sizes_of(layout)
    refused = [axis for axis, size in sizes.items() if size > 1 and (case, axis) in REFUSED]
    if refused:
        with pytest.raises(UserError, match='|'.join(f'mesh.{axis} can be 1' for axis in refused)):
            check_partition(network_of(case).arch, sizes)
        return
    check_partition(network_of(case).arch, sizes)
    assert_same(mesh_program(case, sizes)(), on_one_device(case), outputs=5e-5)


@EVERY_CASE
def test_work_grows_as_it_should(case):
    """Multiply-accumulates from 1,024 to 4,096 tokens."""
    graphdef, params = mixer_of(case)

    def macs(side):
        x = jax.ShapeDtypeStruct((1, side * side, WIDTH), jnp.float32)
        return macs_by_parameter(lambda p, x: nnx.merge(graphdef, p)(x, (side, side)), params, x).total()

    exponent = np.log(macs(64) / macs(32)) / np.log(4)
    assert exponent >= 1.4 if case in QUADRATIC else exponent <= 1.01


# Run by a process of its own: it used to end in an abort of XLA.
WAITING = '''
import jax
from lit_jax.runtime import virtual_devices
virtual_devices.give_threads()
import models.test_mixer_contract as contract
on_all = contract.mesh_program('dydila heads', contract.sizes_of('mixed'))
on_one = jax.jit(contract.functools.partial(contract.value_and_gradient, contract.network_of('dydila heads')))
params = contract.random_tree(contract.network_of('dydila heads').abstract())
for _ in range(60):
    jax.block_until_ready((on_all(), on_one(params, contract.batch())))
'''


@pytest.mark.slow
def test_programs_on_all_devices_and_on_one_do_not_wait_for_each_other_for_good():
    """Freshly compiled: with a thread a device, programs of the compilation cache ran and new ones locked
    up."""
    env = {name: value for name, value in os.environ.items()
           if name not in ('PJRT_NPROC', 'NPROC', 'JAX_COMPILATION_CACHE_DIR')}
    env |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
            'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
    done = subprocess.run([sys.executable, '-c', WAITING], env=env, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[:3000]


@EVERY_CASE
def test_a_mixer_states_its_facts(case):
    """Every parameter of mixer and ffn is declared, with its axes; parts lie where they are said to lie."""
    network = network_of(case)
    kind, options = MIXERS[CASES[case]['name']], CASES[case]
    leaves = named_leaves(network.abstract())
    for path, leaf in leaves.items():
        if find_owner(network.arch, path):
            declared = find_leaf(network.arch, path)
            assert len(declared.shape) == leaf.ndim - 1 or declared.path == 'gamma|factor', path
    assert sorted(kind.parts) == ['k', 'o', 'q', 'v']
    for projection, index in kind.parts.values():
        assert index is None or leaves[f'blocks/attn/{projection}/kernel'].shape[2] > index
    assert kind.state_bytes(options, WIDTH, (8, 12)) > 0


def test_every_mixer_is_in_the_table():
    assert {options['name'] for options in CASES.values()} == set(MIXERS)
