"""Computes the loss by time, on the same images and noise for all times and models."""
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.analysis.measures import same_time
from lit_jax.diffusion.kinds import Diffusion
from lit_jax.models.network import Model


def loss_by_time(models: Mapping[str, Model], images: Images, times: Sequence[float], batch_size: int,
                 progress) -> dict:
    """{name: {'mse': ..., 'vb': ...}} of each model, as its diffusion has them. For two, student and teacher,
    also 'difference': {'distill_noise', 'distill_variance'} (of a flow 'distill_velocity'), and 'ratio' of
    the terms that both have, student / teacher.

    Each entry is {'mean': [times], 'error': [times]}: the mean over the images and its standard
    error. The error of a ratio comes from the differences per image, which are small because both models get
    the same noise. Terms as in training, with the images' own labels."""
    values, evaluate = {}, _make_evaluate(models, images.diffusion)
    params = {name: model.params for name, model in models.items()}
    for t in times:
        parts = []
        for start in range(0, len(images), batch_size):
            some = images[start:start + batch_size]
            parts.append(jax.device_get(evaluate(params, some.x0, some.noise, some.label,
                                                 same_time(t, len(some)))))
            progress.add(len(some))
        for name, terms in jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts).items():
            for term, values_P in terms.items():
                values.setdefault(name, {}).setdefault(term, []).append(values_P.astype(np.float64))
    values = {name: {term: np.array(values_TP) for term, values_TP in terms.items()}
              for name, terms in values.items()}
    found = {name: {term: {'mean': values_TP.mean(1).tolist(), 'error': _error(values_TP).tolist()}
                    for term, values_TP in terms.items()} for name, terms in values.items()}
    if len(models) == 2:
        mine, theirs = (values[name] for name in models)
        found['ratio'] = {term: _ratio(mine[term], theirs[term]) for term in mine if term in theirs}
    return found


def _make_evaluate(models: Mapping[str, Model], diffusion: Diffusion):
    @jax.jit
    def evaluate(params, x0, noise, label, t_B):
        x_t = diffusion.add_noise(x0, t_B, noise)
        outputs = {name: model.network.apply(params[name], x_t, t_B, {'label': label})
                   for name, model in models.items()}
        terms = {name: diffusion.losses(output, x0, x_t, t_B, noise)
                 for name, output in outputs.items()}
        if len(outputs) == 2:
            terms['difference'] = diffusion.distillation(*outputs.values(), x0.shape[-1])
        return terms

    return evaluate


def _ratio(mine_TP: np.ndarray, theirs_TP: np.ndarray) -> dict:
    least = np.maximum(theirs_TP.mean(1), np.finfo(np.float64).tiny)
    return {'mean': (mine_TP.mean(1) / least).tolist(),
            'error': (_error(mine_TP - theirs_TP) / least).tolist()}


def _error(values_TP: np.ndarray) -> np.ndarray:
    count = values_TP.shape[1]
    return values_TP.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(values_TP), np.nan)
