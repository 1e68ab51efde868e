"""Token rows cut over `seq`: the same images at 2048 and 4096 pixels, and nothing sent but what must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, random_tree
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.models.mixers import build_mixer
from lit_jax.models.network import Network
from lit_jax.plan.collectives import find_collectives, format_collectives
from lit_jax.training.mesh import make_mesh

WIDTH, HEADS = 32, 2
MIXERS = {'linear': {'name': 'linear', 'heads': HEADS, 'dwc_kernel': 5},
          'softmax': {'name': 'softmax', 'heads': HEADS}}
HEAD = WIDTH // HEADS


def seq_mesh(data=1):
    return make_mesh({'data': data, 'fsdp': 1, 'tensor': 1, 'seq': 8 // data})


def random_params(abstract):
    return random_tree(abstract, 1, 0.3)


def mixer_program(name, side, mesh, gradient=False, batch=1):
    """The compiled mixer on side x side tokens whose rows are cut over `seq`; with its gradient by the
    tokens."""
    mixer = build_mixer(MIXERS[name], WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    tokens = NamedSharding(mesh, P('data', 'seq', None))
    x = jax.ShapeDtypeStruct((batch, side * side, WIDTH), jnp.float32, sharding=tokens)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                            sharding=NamedSharding(mesh, P())), params)

    def run(params, x):
        if not gradient:
            return nnx.merge(graphdef, params)(x, (side, side))
        y, pull = jax.vjp(lambda x: nnx.merge(graphdef, params)(x, (side, side)), x)
        return y, pull(y)[0]

    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=tokens).lower(params, x).compile()


def sent(name, side, **options):
    mesh = seq_mesh(options.pop('data', 1))
    found = find_collectives(mixer_program(name, side, mesh, **options).as_text(), mesh)
    assert all(c.axes == ('seq',) for c in found), format_collectives(found)
    kinds = {kind: [c for c in found if c.kind == kind] for kind in {c.kind for c in found}}
    return {kind: sum(c.total_bytes for c in group) for kind, group in kinds.items()}, found


@pytest.mark.parametrize('gradient', [False, True], ids=['forward', 'forward and backward'])
def test_linear_attention_sends_its_state_and_the_halo_and_nothing_else(gradient):
    """Forward: one sum of kᵀv [K, E, E] and mean k [K, E], two rows each way; backward the same of their
    gradients."""
    passes = 2 if gradient else 1
    small, found = sent('linear', 16, gradient=gradient)
    large, _ = sent('linear', 32, gradient=gradient)
    assert set(small) == set(large) == {'all-reduce', 'collective-permute'}, format_collectives(found)
    state = 4 * HEADS * (HEAD * HEAD + HEAD)
    assert small['all-reduce'] == large['all-reduce'] == passes * state        # whatever the resolution
    row = 4 * 16 * WIDTH
    assert small['collective-permute'] <= (3 if gradient else 1) * 2 * 2 * row
    assert large['collective-permute'] == 2 * small['collective-permute']      # a row is twice as long


def test_batches_are_not_mixed_by_the_sequence_axis():
    bytes_sent, found = sent('linear', 16, data=2, batch=4)
    assert set(bytes_sent) == {'all-reduce', 'collective-permute'}, format_collectives(found)
    assert bytes_sent['all-reduce'] == 2 * 4 * HEADS * (HEAD * HEAD + HEAD)      # two images a device


def test_softmax_attention_gathers_all_keys_and_values():
    """What linear attention saves: the bytes of DiT's collective grow with the tokens."""
    small, _ = sent('softmax', 16)
    large, _ = sent('softmax', 32)
    assert set(small) == {'all-gather'} and small['all-gather'] == 2 * 4 * 16 * 16 * WIDTH
    assert large['all-gather'] == 4 * small['all-gather']


def test_rows_that_do_not_divide_would_gather_the_tokens():
    """The reason why `check_partition` refuses them: the result is right, but everything goes everywhere."""
    bytes_sent, _ = sent('linear', 36)
    assert 'all-gather' in bytes_sent or bytes_sent['collective-permute'] > 8 * 4 * 36 * WIDTH


@pytest.mark.parametrize('pixels', [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_large_image_is_the_same_on_one_device_and_cut_over_eight(pixels):
    """LiT on 16,384 and 65,536 tokens. Sums over that many tokens in another order: relative 1e-4 of the
    largest value."""
    side = pixels // 8
    network = Network({'family': 'dit', 'depth': 2, 'width': WIDTH, 'patch': 2, 'input_size': [side, side],
                       'channels': 4, 'num_classes': 3, 'mixer': MIXERS['linear']}, scan_layers=False)
    params = random_params(network.abstract())
    x = normal(2, (1, side, side, 4))
    args = (params, x, jnp.array([500]), {'label': jnp.array([1])})
    want = jax.jit(network.apply)(*args)
    with jax.set_mesh(seq_mesh()):
        got = jax.jit(network.apply)(*jax.device_put(args, NamedSharding(seq_mesh(), P())))
    assert got.sharding.spec[1] == 'seq'
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))
