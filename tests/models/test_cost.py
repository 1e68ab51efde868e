"""Counting: whose products they are, what a paper leaves out, and what stands between the tokens."""
import jax
import jax.numpy as jnp
import pytest

from lit_jax.models.arch import mixing_layers
from lit_jax.models.cost import (
    Convention,
    format_parameters,
    macs_of,
    network_macs,
    paper_macs,
    state_bytes,
)
from lit_jax.models.macs import count_macs, macs_by_parameter
from lit_jax.models.mixers import MIXERS
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.network import Network

TINY = {'family': 'dit', 'depth': 4, 'width': 32, 'patch': 2, 'input_size': (8, 8), 'channels': 3,
        'num_classes': 3, 'mixer': {'name': 'softmax', 'heads': 2}}
N, D = 16, 32
SOFTMAX, LINEAR = TINY['mixer'], {'name': 'linear', 'heads': 2}


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('mixer, projections, products', [
    (SOFTMAX, {'qkv': 3 * D * D * N, 'proj': D * D * N}, 2 * N * N * D),
    # The state, its product with the queries, the normaliser.
    (LINEAR, {'q': D * D * N, 'kv': 2 * D * D * N, 'proj': D * D * N, 'dwc': 25 * D * N},
     2 * N * D * D // 2 + N * D)])
def test_every_product_is_put_to_its_parameter(mixer, projections, products, scan):
    network = Network({**TINY, 'mixer': mixer}, scan_layers=scan)
    want = {f'blocks/attn/{name}/kernel': 4 * macs for name, macs in projections.items()}
    want |= {'blocks/mlp/fc1/kernel': 4 * 4 * D * D * N, 'blocks/mlp/fc2/kernel': 4 * 4 * D * D * N,
             '': 4 * products,
             'blocks/adaLN/kernel': 4 * 6 * D * D, 't_embedder/fc1/kernel': 256 * D,
             't_embedder/fc2/kernel': D * D, 'x_embedder/kernel': 12 * D * N,
             'final_layer/adaLN/kernel': 2 * D * D, 'final_layer/linear/kernel': D * 24 * N}
    assert dict(macs_of(network)) == want
    assert network_macs(network) == sum(want.values())


def test_parameters_that_are_made_ready_stay_theirs():
    """Casts, slices, reshapes, sums of parameters, and calls of all kinds do not hide whose product it is."""
    params = {'a': jnp.ones((4, 6)), 'b': jnp.ones((4, 6)), 'c': jnp.ones((3, 2, 2))}

    def fn(params, x):
        folded = jax.checkpoint(lambda a, b: a.at[:2].add(b[2:]).astype(jnp.bfloat16)[:, :5])(
            params['a'], params['b'])
        y = jax.jit(lambda x, w: x @ w)(x.astype(jnp.bfloat16), folded)
        z = jax.lax.scan(lambda carry, w: (carry @ w, None), jnp.ones((7, 2)), params['c'])[0]
        return y.sum() + z.sum() + (x @ x.T).sum()

    assert macs_by_parameter(fn, params,
                             jnp.ones((8, 4))) == {'a b': 8 * 4 * 5, 'c': 3 * 7 * 2 * 2, '': 8 * 4 * 8}


def test_a_grouped_product_counts_one_group_a_row():
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 3, 3])
    assert count_macs(jax.lax.ragged_dot, x, w, sizes) == 8 * 4 * 5
    gradient = jax.grad(lambda w: jax.lax.ragged_dot(x, w, sizes).sum())
    assert count_macs(gradient, w) in (8 * 4 * 5, 2 * 8 * 4 * 5)        # with or without the forward pass

    def on_platforms(x, w):
        return jax.lax.platform_dependent(x, w, cpu=lambda x, w: jnp.einsum('md,pdf->pmf', x, w).sum(0),
                                          default=lambda x, w: jax.lax.ragged_dot(x, w, sizes))

    assert count_macs(on_platforms, x, w) == 8 * 4 * 5


def test_a_routed_projection_costs_one_projector_a_token():
    def macs(projectors):
        mixer = {'name': 'dydila', 'heads': 1, 'projectors': projectors, 'powers': 9, 'factors': 9}
        return macs_of(Network({**TINY, 'ffn': 'mix', 'mixer': mixer}))

    few, many = macs(3), macs(7)
    assert few['blocks/attn/routed_q/kernel'] == many['blocks/attn/routed_q/kernel'] == 4 * N * D * D
    assert many.total() - few.total() == 2 * 4 * N * D * (7 - 3)        # the routers' own columns


def test_the_dearest_platform_counts():
    def fn(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: x)

    assert count_macs(fn, jnp.ones((5, 5))) == 5 ** 3


def test_what_a_paper_leaves_out():
    network = Network({**TINY, 'mixer': LINEAR})
    full = network_macs(network)
    assert paper_macs(network, Convention()) == full
    assert paper_macs(network, Convention(left_out=('*/mlp/fc2/kernel',))) == full - 16 * D * D * N
    products = 4 * (N * D * D + N * D)
    assert paper_macs(network, Convention('none')) == full - products
    # 16 tokens in heads of 16 channels: both orders cost 2·N²·D; the normaliser is not counted.
    assert paper_macs(network, Convention('cheaper')) == full - 4 * N * D
    wide = Network({**TINY, 'mixer': {**LINEAR, 'heads': 1}})
    assert paper_macs(wide, Convention('cheaper')) == network_macs(wide) - 4 * (
        2 * N * D * D + N * D) + 4 * 2 * N * N * D
    with pytest.raises(ValueError, match=r"no product of this network has a parameter like '\*/down/kernel'"):
        paper_macs(network, Convention(left_out=('*/down/kernel',)))


def test_state_is_what_tokens_exchange():
    large = {**TINY, 'input_size': (32, 32)}
    assert state_bytes(TINY) == 4 * 2 * N * D * 2 and state_bytes(large) == 16 * state_bytes(TINY)
    linear = {**TINY, 'mixer': LINEAR}
    assert state_bytes(linear) == state_bytes({**large, 'mixer': LINEAR}) == 4 * 4 * 2 * (16 * 16 + 16)
    compressed = {**TINY, 'stages': ({'depth': 1}, {'depth': 3, 'mixer': {'compress': 2}})}
    assert state_bytes(compressed) == 2 * 2 * D * (N + 3 * N // 4)
    assert mixing_layers(compressed) == [(1, SOFTMAX, D, (4, 4)), (3, {**SOFTMAX, 'compress': 2}, D, (4, 4))]
    assert f'{state_bytes(TINY) / 2 ** 20:.4g} MiB of state' in format_parameters(Network(TINY))


def test_a_mixer_need_not_say_its_state(monkeypatch):
    monkeypatch.setattr(MIXERS['softmax'], 'state_bytes', Mixer.state_bytes)
    assert state_bytes(TINY) is None
    assert 'GMACs' in format_parameters(Network(TINY)) and 'of state' not in format_parameters(Network(TINY))
