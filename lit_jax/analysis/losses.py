"""Computes the loss by timestep, on the same images and noise for all timesteps and models."""
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.diffusion.distillation import distillation_losses
from lit_jax.diffusion.objective import q_sample, training_losses
from lit_jax.models.network import Model


def loss_by_timestep(models: Mapping[str, Model], images: Images, timesteps: Sequence[int], batch_size: int,
                     progress) -> dict:
    """{name: {'mse': ..., 'vb': ...}} of each model. For two, student and teacher, also 'difference':
    {'distill_noise', 'distill_variance'}, and 'ratio': {'mse', 'vb'}, student / teacher.

    Each entry is {'mean': [timesteps], 'error': [timesteps]}: the mean over the images and its standard
    error. The error of a ratio comes from the differences per image, which are small because both models get
    the same noise. Terms as in training, with the images' own labels."""
    values, evaluate = {}, _make_evaluate(models, images.schedule)
    params = {name: model.params for name, model in models.items()}
    for t in timesteps:
        parts = []
        for start in range(0, len(images), batch_size):
            some = images[start:start + batch_size]
            parts.append(jax.device_get(evaluate(params, some.x0, some.noise, some.label,
                                                 np.full(len(some), t, np.int32))))
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
        found['ratio'] = {term: _ratio(mine[term], theirs[term]) for term in mine}
    return found


def _make_evaluate(models: Mapping[str, Model], schedule):
    @jax.jit
    def evaluate(params, x0, noise, label, t_B):
        x_t = q_sample(schedule, x0, t_B, noise)
        outputs = {name: model.network.apply(params[name], x_t, t_B, {'label': label})
                   for name, model in models.items()}
        terms = {name: training_losses(schedule, output, x0, x_t, t_B, noise)
                 for name, output in outputs.items()}
        if len(outputs) == 2:
            terms['difference'] = distillation_losses(*outputs.values(), x0.shape[-1])
        return terms

    return evaluate


def _ratio(mine_TP: np.ndarray, theirs_TP: np.ndarray) -> dict:
    least = np.maximum(theirs_TP.mean(1), np.finfo(np.float64).tiny)
    return {'mean': (mine_TP.mean(1) / least).tolist(),
            'error': (_error(mine_TP - theirs_TP) / least).tolist()}


def _error(values_TP: np.ndarray) -> np.ndarray:
    count = values_TP.shape[1]
    return values_TP.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(values_TP), np.nan)
