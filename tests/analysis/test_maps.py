"""Attention maps of a model, against plain numpy and against what its layers give."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_models import randomised

from lit_jax.analysis.maps import Attention, attention_map
from lit_jax.analysis.survey import survey
from lit_jax.analysis.tokens import key_grid, parse_layers, parse_token, token_maps
from lit_jax.models.mixers.linear import linear_attention
from lit_jax.models.mixers.softmax import dot_product_attention
from lit_jax.models.network import Model, Network
from lit_jax.runtime.errors import UserError

SOFTMAX = {'name': 'softmax', 'heads': 2, 'qkv_bias': True}
LINEAR = {'name': 'linear', 'heads': 2, 'dwc_kernel': 3}


MODELS = {'softmax': {'mixer': SOFTMAX}, 'linear': {'mixer': LINEAR},
          'compressed': {'mixer': {**SOFTMAX, 'compress': 2}},
          'edit': {'mixer': {'name': 'edit', 'heads': 1}},
          'dydila': {'mixer': {'name': 'dydila', 'heads': 1}},
          'small': {'mixer': SOFTMAX, 'width': 8, 'depth': 1},
          'runs': {'mixer': SOFTMAX, 'stages': ({'depth': 1}, {'depth': 2, 'mixer': {'compress': 2}})}}


@functools.cache
def model_of(name):
    network = Network({'family': 'dit', 'depth': 3, 'width': 32, 'patch': 2, 'input_size': (8, 12),
                       'channels': 1, 'num_classes': 10, **MODELS[name]})
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.abstract())
    return Model(network, randomised(zeros, 0.3), {'provenance': {'source': 'random'}})


def inputs(count=3, size=(8, 12)):
    rng = np.random.default_rng(4)
    return rng.standard_normal((count, *size, 1)).astype(np.float32), np.arange(count, dtype=np.int32)


def random_heads(seed=0, queries=6, keys=6):
    rng = np.random.default_rng(seed)
    q, k = (rng.random((n, 2, 4)).astype(np.float32) for n in (queries, keys))
    return q, k, rng.standard_normal((keys, 2, 4)).astype(np.float32)


def slow_map(kind, q, k):
    """Weight by weight in float64."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    maps = np.zeros((q.shape[1], len(q), len(k)))
    for head in range(q.shape[1]):
        for n in range(len(q)):
            weights = np.array([q[n, head] @ k[m, head] for m in range(len(k))])
            if kind == 'softmax':
                weights = np.exp(weights / np.sqrt(q.shape[-1]))
                maps[head, n] = weights / weights.sum()
            else:
                maps[head, n] = weights / len(k) / (weights.mean() + 1e-6)
    return maps


@pytest.mark.parametrize('kind', ['softmax', 'linear'])
@pytest.mark.parametrize('keys', [6, 3])
def test_maps_are_those_of_plain_numpy_and_their_rows_sum_to_one(kind, keys):
    q, k, _ = random_heads(keys=keys)
    maps = attention_map(kind, q, k)
    np.testing.assert_allclose(maps, slow_map(kind, q, k), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize('kind, attend', [('softmax', dot_product_attention), ('linear', linear_attention)])
def test_a_map_times_the_values_is_what_the_layer_computes(kind, attend):
    q, k, v = random_heads(1)
    want = attend(*(jnp.asarray(a)[None] for a in (q, k, v)))[0]
    np.testing.assert_allclose(np.einsum('knm,mke->nke', attention_map(kind, q, k), v), want, rtol=1e-4,
                               atol=1e-5)


def test_a_sum_without_normaliser_keeps_its_signs():
    q, k, _ = random_heads(2)
    np.testing.assert_allclose(attention_map('sum', q - 0.5, k), np.einsum('nke,mke->knm', q - 0.5, k) / 6,
                               rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['softmax', 'linear', 'compressed', 'edit', 'dydila'])
def test_every_layer_shows_its_queries_and_keys(name):
    model = model_of(name)
    x, label = inputs()
    attention = Attention(model, 'the model')
    layers = attention.layers(x, 500, label)
    assert (attention.depth, len(layers), attention.grid) == (3, 3, (4, 6))
    keys, head = 6 if name in ('compressed',
                               'edit') else 24, (1, 32) if name in ('edit', 'dydila') else (2, 16)
    for layer in layers:
        assert layer.query.shape == (3, 24, *head) and layer.key.shape == (3, keys, *head)
        maps = attention_map(layer.kind, layer.query[0], layer.key[0])
        if layer.kind == 'sum':      # differences have signs and no normaliser
            assert name == 'dydila' and np.isfinite(maps).all() and np.any(maps)
        else:
            np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-4)
            assert (np.asarray(maps) >= 0).all()
    if name == 'linear':
        for i, layer in enumerate(layers):
            np.testing.assert_array_equal(layer.convolution,
                                          model.params['blocks']['attn']['dwc']['kernel'][i])
    else:
        assert all(layer.convolution is None for layer in layers)


def test_layers_of_unlike_runs_of_blocks_come_in_order():
    attention = Attention(model_of('runs'), 'the model')
    x, label = inputs()
    assert [layer.key.shape[1] for layer in attention.layers(x, 10, label)] == [24, 6, 6]


def test_what_is_shown_does_not_change_what_is_computed():
    model = model_of('linear')
    x, label = inputs()
    t = np.full(3, 500, np.int32)
    observed, _ = model.network.observe(model.params, x, t, {'label': label},
                                        ('linear/query', 'linear/convolution'))
    np.testing.assert_allclose(observed, model(x, t, label), rtol=1e-4, atol=1e-5)


class Still:
    """Images that are the same at every timestep."""

    def __init__(self, x, label):
        self.x, self.label = x, label

    def __len__(self):
        return len(self.x)

    def __getitem__(self, which):
        return Still(self.x[which], self.label[which])

    def noised(self, t):
        return self.x


class Nothing:
    def add(self, count):
        """Counts nothing."""


def test_the_survey_is_the_mean_over_images_for_any_batch():
    model, (x, label) = model_of('linear'), inputs()
    attention = Attention(model, 'the model')
    found = survey(attention, Still(x, label), [100, 900], ['similarity', 'rank'], Nothing())
    single = [survey(attention, Still(x[i:i + 1], label[i:i + 1]), [900], ['similarity'], Nothing())
              for i in range(3)]
    mean = np.mean([one['similarity']['cosine'][0] for one in single], axis=0)
    np.testing.assert_allclose(found['similarity']['cosine'][1], mean, rtol=1e-5)
    small = Attention(model, 'the model', memory=attention.image_bytes)
    assert (attention.batch > 3, small.batch) == (True, 1)
    again = survey(small, Still(x, label), [100, 900], ['similarity', 'rank'], Nothing())
    for part, name in (('similarity', 'cosine'), ('similarity', 'centred')):
        np.testing.assert_allclose(again[part][name], found[part][name], atol=1e-5)
    ranks = found['rank']
    assert (ranks['tokens'], ranks['bound']) == (24, 16)
    assert np.array(ranks['map']['effective']).shape == np.array(found['similarity']['cosine']).shape == (
        2, 3)
    assert np.max(ranks['map']['numerical']) <= 16 < np.min(ranks['with_convolution']['numerical'])
    assert np.all(np.array(ranks['map']['effective']) <= ranks['map']['numerical'])


def test_few_queries_stand_for_all_where_memory_is_short():
    """Maps of 4 * 24 * 24 * 2 bytes do not fit beside the queries of one image: every few queries are
    taken."""
    model, (x, label) = model_of('small'), inputs(1)
    whole = Attention(model, 'the model')
    short = Attention(model, 'the model', memory=whole.image_bytes)
    assert whole.row_step() == 1 and short.row_step() > 1
    found = [survey(one, Still(x, label), [500], ['similarity'], Nothing())['similarity']
             for one in (whole, short)]
    assert found[1]['every_nth_query'] == short.row_step()
    np.testing.assert_allclose(found[1]['cosine'], found[0]['cosine'], atol=0.1)


def test_the_map_of_a_token_is_its_row_of_the_whole_map():
    model, (x, label) = model_of('compressed'), inputs()
    attention = Attention(model, 'the model')
    found = token_maps(attention, Still(x, label), 1, 300, (2, 5), [0, 2])
    layer = attention.layers(x[1:2], 300, label[1:2])[2]
    want = attention_map('softmax', layer.query[0], layer.key[0])[:, 2 * 6 + 5].reshape(2, 2, 3)
    np.testing.assert_allclose(found['maps'][1], want, rtol=1e-5)
    assert found['uniform'] == [1 / 6, 1 / 6]


@pytest.mark.parametrize('grid, keys, want', [((4, 6), 24, (4, 6)), ((4, 6), 6, (2, 3)), ((5, 5), 9, (3, 3))])
def test_keys_lie_on_a_coarser_grid(grid, keys, want):
    assert key_grid(grid, keys) == want


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs():
    model = model_of('softmax')
    with pytest.raises(UserError, match=r'one image in the model take .* GiB of --memory'):
        Attention(model, 'the model', memory=1000)
    with pytest.raises(UserError, match='do not lie on the grid'):
        key_grid((4, 4), 7)


@pytest.mark.parametrize('text, message',
                         [('4,0', 'outside the grid of 4 x 6'), ('0,6', 'columns 0 to 5'),
                          ('3', 'ROW,COLUMN'), ('-1,0', 'ROW,COLUMN'), ('a,b', 'ROW,COLUMN'),
                          ('1,2,3', 'ROW,COLUMN')])
def test_a_token_off_the_grid_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_token(text, (4, 6))


def test_tokens_and_layers_that_are_there():
    assert (parse_token('', (4, 6)), parse_token('3, 5', (4, 6))) == ((2, 3), (3, 5))
    assert parse_layers('', 12, 'it', 4) == [0, 4, 7, 11] and parse_layers('2,0', 3, 'it', 4) == [2, 0]
    for wrong in ('3', '0,x', '-1'):
        with pytest.raises(UserError, match='layers'):
            parse_layers(wrong, 3, 'it', 4)
