"""The T5 encoder against transformers (golden files), its forms of weights against each other, and its places
on a mesh."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import weights
from text_encoder_samples import ARCH, random_params
from tiers import quick
from torchvision_shim import import_oracle

from lit_jax.checkpoint.text_encoder_folder import KERNELS, pack
from lit_jax.convert.text_encoder_torch import read_text_encoder_params, to_torch_state
from lit_jax.convert.torch_files import source_from_arrays
from lit_jax.models.t5 import T5_XXL, T5Network, check_t5_arch, position_buckets, quantise, rms_norm
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, tree_bytes, unflatten
from lit_jax.training.mesh import make_mesh, state_shardings

GOLDEN = ['t5_short', 't5_long']
XXL_PARAMETERS = 4_762_310_656      # of T5EncoderModel at t5-v1_1-xxl's config.json


def load_golden(path, dtype):
    """(network, params, arrays) of a golden file."""
    meta, state, arrays = weights.load(path)
    config = meta['config']
    network = T5Network({'vocab': config['vocab'], 'width': config['d'], 'layers': config['layers'],
                         'heads': config['heads'],
                         'head_dim': config['kv'], 'ffn': config['ff'], 'buckets': config['buckets'],
                         'max_distance': config['dist']}, dtype=dtype)
    params = read_text_encoder_params(source_from_arrays(state), network.arch, path.name)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return network, jax.tree.map(lambda p: jnp.asarray(p, wide), params), arrays


def outputs(network, params, arrays):
    ids, mask = (jnp.asarray(arrays[name], jnp.int32) for name in ('in_ids', 'in_mask'))
    run = jax.jit(network.apply)
    return {'hidden': run(params, ids, mask), 'hidden_nomask': run(params, ids, jnp.ones_like(mask))}


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float64)
                  - np.asarray(want, np.float64)).max() / np.abs(np.asarray(want, np.float64)).max()


def in_form(params, form):
    """The float32 tree with its weights in another form."""
    flat = {}
    for name, leaf in named_leaves(params).items():
        flat |= pack(name, leaf if name in KERNELS else [leaf], len(leaf), form)
    return unflatten(flat)


# ------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize('name', quick(GOLDEN, ['t5_short']))
def test_float32_is_the_published_encoder(goldens, name):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float32)
    for key, got in outputs(network, params, arrays).items():
        assert got.dtype == jnp.float32
        assert relative_error(got, arrays[f'out64_{key}']) <= 1e-5


@pytest.mark.parametrize('name', GOLDEN)
def test_float64_is_the_published_encoder(goldens, name, x64):
    network, params, arrays = load_golden(goldens / f'{name}.npz', jnp.float64)
    for key, got in outputs(network, params, arrays).items():
        assert got.dtype == jnp.float64
        assert relative_error(got, arrays[f'out64_{key}']) <= 1e-12


@pytest.mark.parametrize('name', GOLDEN)
def test_buckets_and_bias_are_the_published_ones(goldens, name):
    meta, state, arrays = weights.load(goldens / f'{name}.npz')
    config, distance = meta['config'], np.arange(-600, 601)
    assert np.array_equal(position_buckets(distance, config['buckets'], config['dist']),
                          arrays['out_buckets'])
    assert np.array_equal(position_buckets(distance, 32, 128), arrays['out_buckets_32_128'])
    table = state['encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight']
    positions = np.arange(arrays['in_ids'].shape[1])
    bias = table[position_buckets(positions[None] - positions[:, None], config['buckets'],
                                  config['dist'])].transpose(2, 0, 1)
    assert np.array_equal(bias[None, :, ::7, ::5].astype(np.float64), arrays['mid_position_bias'])


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize('family', ['t5', 'mt5'])
def test_full_width_is_the_encoder_of_transformers(family):
    """Width, heads and mlp of T5-XXL, two layers, padding on both sides of the tokens."""
    transformers = import_oracle('transformers')
    import torch
    kind = {'t5': ('T5Config', 'T5EncoderModel'), 'mt5': ('MT5Config', 'MT5EncoderModel')}[family]
    config = getattr(transformers, kind[0])(vocab_size=256, d_model=4096, d_kv=64, d_ff=10240, num_layers=2,
                                            num_heads=64, feed_forward_proj='gated-gelu')
    torch.manual_seed(0)
    model = getattr(transformers, kind[1])(config).eval()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, 40))
    mask = np.ones_like(ids)
    mask[0, 30:], mask[1, :5] = 0, 0
    with torch.no_grad():
        want = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    del model
    network = T5Network({**T5_XXL, 'vocab': 256, 'layers': 2})
    params = read_text_encoder_params(source_from_arrays(state), network.arch, 'transformers')
    assert relative_error(jax.jit(network.apply)(params, jnp.asarray(ids), jnp.asarray(mask)), want) <= 2e-5


# ------------------------------------------------------------------------------------------------------
# Forms of the weights


IDS = np.random.default_rng(1).integers(3, ARCH['vocab'], (3, 20)).astype(np.int32)
MASK = (np.arange(20) < np.array([20, 7, 1])[:, None]).astype(np.int32)


@pytest.fixture(scope='module')
def exact():
    params = random_params()
    return params, np.asarray(jax.jit(T5Network(ARCH).apply)(params, IDS, MASK))


@pytest.mark.parametrize('form, compute, bound', [
    ('bfloat16', jnp.float32, 0.02), ('float32', jnp.bfloat16, 0.04), ('bfloat16', jnp.bfloat16, 0.04),
    ('int8', jnp.float32, 0.03), ('int8', jnp.bfloat16, 0.05)])
def test_narrow_forms_stay_near_float32(exact, form, compute, bound):
    """Relative to the norm of the features: bfloat16 rounds to 1/256, int8 each kernel to half of 1/127 of
    its largest entry."""
    params, want = exact
    network = T5Network(ARCH, compute, form)
    got = jax.jit(network.apply)(in_form(params, form), IDS, MASK)
    assert got.dtype == compute
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert 1e-5 < error < bound


@pytest.mark.parametrize('form', ['float32', 'bfloat16', 'int8'])
def test_fresh_parameters_have_the_abstract_form(form):
    network = T5Network(ARCH, weights=form)
    params = jax.jit(network.init)(jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype),
                        params) == jax.tree.map(lambda a: (a.shape, a.dtype), network.abstract())
    features = jax.jit(network.apply)(params, IDS, MASK)
    assert 0.3 < float(jnp.std(features.astype(jnp.float32))) < 3 and features.shape == (3, 20, 16)


def test_int8_keeps_the_largest_entry_of_each_channel():
    kernel = np.random.default_rng(0).normal(size=(5, 3, 2, 7)).astype(np.float32)
    values, scale = quantise(kernel, 1)
    assert values.dtype == jnp.int8 and scale.shape == (1, 3, 2, 7) and scale.dtype == jnp.float32
    assert (np.abs(np.asarray(values, np.int32)).max(0) >= 127).all()
    assert (np.abs(values * np.asarray(scale) - kernel) <= np.asarray(scale) / 2 * 1.0001).all()


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the option is for CPUs')
def test_int8_kernels_are_widened_one_at_a_time():
    """All four of a layer at once took 0.8 GB at XXL size."""
    network = T5Network({**ARCH, 'width': 256, 'heads': 4, 'head_dim': 64, 'ffn': 512, 'layers': 3},
                        weights='int8')
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    program = jax.jit(network.apply,
                      compiler_options=network.inference_options()).lower(network.abstract(), ids,
                                                                          ids).compile()
    layer = [4 * leaf.size // 3 for path, leaf in named_leaves(network.abstract()).items() if path in KERNELS]
    assert len(layer) == 4
    assert max(layer) < program.memory_analysis().temp_size_in_bytes < 0.75 * sum(layer)


def test_size_of_the_xxl_encoder():
    """The figures of the laptop setting: int8 within 6 GB, and nothing of it in float32 but gains, bias and
    scales."""
    count = sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(T5Network(T5_XXL).abstract()))
    assert count == XXL_PARAMETERS
    assert tree_bytes(T5Network(T5_XXL, weights='bfloat16').abstract()) < 9.6e9
    int8 = T5Network(T5_XXL, weights='int8').abstract()
    assert 4.8e9 < tree_bytes(int8) < 5.0e9
    assert sum(leaf.size for leaf in jax.tree.leaves(int8) if leaf.dtype == jnp.float32) < 2e6


# ------------------------------------------------------------------------------------------------------
# Behaviour


def test_padding_does_not_reach_the_tokens(exact):
    params, want = exact
    other = np.where(MASK, IDS, 5)
    got = jax.jit(T5Network(ARCH).apply)(params, other, MASK)
    for row, length in enumerate(MASK.sum(1)):
        np.testing.assert_allclose(got[row, :length], want[row, :length], atol=1e-6)


def test_a_row_without_tokens_gives_numbers(exact):
    got = jax.jit(T5Network(ARCH).apply)(exact[0], IDS, np.zeros_like(MASK))
    assert np.isfinite(got).all()


def test_unrolled_layers_give_the_same(exact):
    params, want = exact
    got = jax.jit(T5Network(ARCH, scan_layers=False).apply)(params, IDS, MASK)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_norms_are_taken_in_float32():
    x = jnp.full((1, 4), 300.0, jnp.float16)     # its square is no float16
    assert np.allclose(rms_norm(x, jnp.ones(4)), 1)


def test_weights_can_be_trained(exact):
    """The little encoder of a demo is trained by our own recipe: every leaf of a float tree has a
    gradient."""
    network = T5Network(ARCH)
    gradient = jax.jit(jax.grad(lambda params: jnp.square(network.apply(params, IDS, MASK)).sum()))(exact[0])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('form', ['float32', 'int8'])
def test_a_mesh_gives_the_same_features(form, exact):
    arch = {**ARCH, 'heads': 4, 'head_dim': 3}
    params = in_form(random_params(arch), form)
    network = T5Network(arch, weights=form)
    ids, mask = np.tile(IDS, (2, 1))[:4], np.tile(MASK, (2, 1))[:4]
    want = np.asarray(jax.jit(network.apply)(params, ids, mask))
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'seq': 1}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(network.abstract(), mesh))
        got = jax.jit(network.apply)(placed, ids, mask)
    kernel = placed['blocks']['mlp']['gate']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_torch_names_hold_every_value_once():
    state = dict(to_torch_state(random_params()))
    back = read_text_encoder_params(source_from_arrays(state), check_t5_arch(ARCH), 'a state')
    for name, leaf in named_leaves(random_params()).items():
        assert np.array_equal(named_leaves(back)[name], leaf)


@pytest.mark.parametrize('change, words', [
    ({'heads': 0}, 'heads must be a positive'), ({'buckets': 6}, 'multiple of 4'),
    ({'max_distance': 2}, 'must be over'), ({'depth': 3}, 'unknown fields depth'),
    ({'vocab': True}, 'vocab must be')])
def test_wrong_architectures_are_named(change, words):
    with pytest.raises(UserError, match=words):
        T5Network({**ARCH, **change})


def test_wrong_inputs_are_named(exact):
    with pytest.raises(UserError, match='one shape'):
        T5Network(ARCH).apply(exact[0], IDS, MASK[:2])
    with pytest.raises(UserError, match='unknown form'):
        T5Network(ARCH, weights='int4')
