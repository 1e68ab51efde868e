"""Counts the choices of mixers that route tokens, by layer and class (DyDi-LiT, figure 5).

Such a mixer exposes indices [B, N] under names that begin with 'route/'.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.analysis.measures import same_time
from lit_jax.models.arch import shown_by
from lit_jax.models.network import Model

MOST_CLASSES = 16


def route_names(model: Model) -> list[str]:
    """The names under which this model exposes choices: `routes` of its mixers, if their options use them."""
    names, arch = shown_by(model.arch, 'routes'), model.arch
    shape, one = (1, *arch['input_size'], arch['channels']), jnp.zeros(1, jnp.int32)
    seen = jax.eval_shape(lambda params, x, t, y: model.network.observe(params, x, t, {'label': y}, names)[1],
                          model.network.abstract(), jnp.zeros(shape, jnp.float32), one, one)
    return [name for name in names if seen[name]]        # jax has sorted `seen`


def routing(model: Model, names: Sequence[str], images: Images, t: float, batch_size: int, progress) -> dict:
    """`{name: {'classes': [...], 'choice': [class][layer], 'share': [class][layer], 'used': [layer]}}`.

    choice: the most frequent index among the tokens of a class. share: of the tokens that have it. used: the
    number of different indices in the layer. names: from `route_names`."""
    observe = jax.jit(lambda params, x, t, y: model.network.observe(params, x, t, {'label': y}, names)[1])
    indices = {name: [] for name in names}
    for start in range(0, len(images), batch_size):
        some = images[start:start + batch_size]
        seen = observe(model.params, some.noised(t), same_time(t, len(some)), some.label)
        for name in names:
            indices[name].append(np.concatenate([np.asarray(stack).reshape(*stack.shape[:2], -1)
                                                 for stack in seen[name]]))
        progress.add(len(some))
    return {name: most_frequent(np.concatenate(parts, axis=1), images.label)
            for name, parts in indices.items()}


def most_frequent(index_LBN: np.ndarray, label_B: np.ndarray) -> dict:
    """See `routing`; for the classes with the smallest labels."""
    classes = np.unique(label_B)[:MOST_CLASSES]
    choice, share = [], []
    for label in classes:
        tokens = index_LBN[:, label_B == label].reshape(len(index_LBN), -1)
        counts = np.array([np.bincount(layer, minlength=int(index_LBN.max()) + 1) for layer in tokens])
        choice.append(counts.argmax(1).tolist())
        share.append((counts.max(1) / tokens.shape[1]).tolist())
    return {'classes': classes.tolist(), 'choice': choice, 'share': share,
            'used': [len(np.unique(layer)) for layer in index_LBN]}
