"""Measures the similarity of the heads and the rank of each layer, averaged over images."""
import logging
from collections.abc import Sequence

import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.analysis.maps import Attention, Layer, attention_map
from lit_jax.analysis.measures import (
    convolution_operator,
    effective_rank,
    head_similarity,
    numerical_rank,
    singular_values,
    spread,
)

LOG = logging.getLogger('lit_jax')
RANK_TOKENS = 1024       # the singular values of a map cost N³
RANK_IMAGES, RANK_TIMESTEPS = 2, 3
CHANNELS = 2             # of a head, whose matrices with the convolution are measured


def survey(attention: Attention, images: Images, times: Sequence[float], parts: Sequence[str],
           progress) -> dict:
    """{'similarity': ..., 'rank': ...}, those that are in `parts`, with lists `[times][layers]`.

    similarity: {'heads', 'cosine', 'centred'}; see `head_similarity`. rank: {'tokens', 'bound', 'map',
    'with_convolution'}, at no more than RANK_TIMESTEPS times, and absent if N > RANK_TOKENS. Its last two
    (the last only with a convolution) are {'effective', 'numerical', 'spectrum'}: means over heads, images
    and channels; 'spectrum' is that of the middle layer at the middle time."""
    n = attention.grid[0] * attention.grid[1]
    parts = [part for part in parts if part != 'rank' or _rank_is_affordable(attention, n)]
    step = attention.row_step()
    if step > 1 and 'similarity' in parts:
        LOG.info('%s: maps of %d tokens exceed --memory; using one query in %d', attention.name, n, step)
    ranked = spread(len(times), RANK_TIMESTEPS)
    rows = [_one_time(attention, images, t, [part for part in parts if part != 'rank' or i in ranked],
                          step, progress)
            for i, t in enumerate(times)]
    found = {}
    if 'similarity' in parts:
        cosines = np.array([[[layer['similarity'] for layer in layers] for layers in row] for row in rows])
        means = _nanmean(cosines, axis=1)                       # [times, layers, 2]
        found['similarity'] = {'heads': max(heads for _, _, heads, _ in attention.shapes),
                               'every_nth_query': step, 'cosine': means[..., 0].tolist(),
                               'centred': means[..., 1].tolist()}
    if 'rank' in parts:
        found['rank'] = _rank_summary(attention, [rows[i] for i in ranked], n)
        found['rank']['timesteps'] = [times[i] for i in ranked]
    return found


def _rank_is_affordable(attention: Attention, n: int) -> bool:
    if n > RANK_TOKENS:
        LOG.warning('%s has %d tokens: rank left out, only computed up to %d', attention.name, n, RANK_TOKENS)
    return n <= RANK_TOKENS


def _nanmean(values, axis):
    """The mean of the finite values; NaN, without a warning, if there are none."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    count = known.sum(axis)
    return np.where(count, np.where(known, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def _one_time(attention: Attention, images: Images, t: float, parts, step: int,
                  progress) -> list[list[dict]]:
    """Measurements `[images][layers]`."""
    measured = []
    for start in range(0, len(images), attention.batch):
        some = images[start:start + attention.batch]
        layers = attention.layers(some.noised(t), t, some.label)
        for i in range(len(some)):
            with_rank = 'rank' in parts and start + i < RANK_IMAGES
            measured.append([_measure(layer, i, attention.grid, 'similarity' in parts, with_rank, step)
                             for layer in layers])
            progress.add(1)
    return measured


def _measure(layer: Layer, image: int, grid, similarity: bool, rank: bool, step: int) -> dict:
    found = {}
    if similarity:
        maps = attention_map(layer.kind, layer.query[image, ::step], layer.key[image])
        found['similarity'] = [float(value) for value in head_similarity(maps)]
    if rank:
        maps = np.asarray(attention_map(layer.kind, layer.query[image], layer.key[image]), np.float64)
        found['map'] = _ranks(maps)
        if layer.convolution is not None:
            channels = spread(layer.convolution.shape[-1], CHANNELS)
            found['with_convolution'] = _ranks(maps[:, None] +
                                               convolution_operator(layer.convolution, grid, channels))
    return found


def _ranks(matrices) -> dict:
    values = singular_values(matrices)
    shares = values / values[..., :1]
    return {'effective': effective_rank(values).mean(),
            'numerical': numerical_rank(values, matrices.shape[-2:]).mean(),
            'spectrum': shares.reshape(-1, shares.shape[-1]).mean(0)}


def _rank_summary(attention: Attention, rows, n: int) -> dict:
    middle_t, middle = len(rows) // 2, attention.depth // 2
    chosen = [[layers for layers in row if 'map' in layers[0]] for row in rows]
    summary = {'tokens': n, 'bound': min(n, *(keys if attention.kind == 'softmax' else min(keys, width)
                                              for _, keys, _, width in attention.shapes)),
               'pictures': len(chosen[0]), 'middle_layer': middle, 'middle_timestep': middle_t}
    for name in ('map', 'with_convolution'):
        if name not in chosen[0][0][0]:
            continue
        summary[name] = {what: np.mean([[[layer[name][what] for layer in layers] for layers in row]
                                        for row in chosen], axis=1).tolist()
                         for what in ('effective', 'numerical')}
        spectra = [layers[middle][name]['spectrum'] for layers in chosen[middle_t]]
        summary[name]['spectrum'] = np.mean(spectra, axis=0).tolist()
    return summary
