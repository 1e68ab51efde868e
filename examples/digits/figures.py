"""Measures the models of the demo: Fréchet distance and class accuracy by a judge, a classifier of digits.

The distance is in the judge's 48 features, of unguided samples to the real training split. Class accuracy is
that of the judge on guided samples. All models draw from the same noise.
"""
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from lit_jax.checkpoint.load import load
from lit_jax.data.sources import Source, open_source
from lit_jax.diffusion.settings import CLASSES
from lit_jax.metrics.toys.digits_judge import Judge, load_judge
from lit_jax.models.cost import network_macs
from lit_jax.models.network import Model, count_parameters
from lit_jax.sampling.noise import initial_noise, step_keys
from lit_jax.sampling.program import build_sampler

# Samples for distance and accuracy. The distance varies by a tenth with 2000, a third with 1000.
UNGUIDED, GUIDED = 2000, 500
STEPS, CFG_SCALE, BATCH = 50, 2.0, 250
SEED = 1234


def all_of(source: Source) -> dict[str, np.ndarray]:
    """All examples of a small data set."""
    return source.take(range(len(source)))


def draw(model: Model, count: int, cfg_scale: float, seed: int = SEED,
         steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of `count` samples with balanced classes; the same noise for all models."""
    network, size, images = model.network, min(BATCH, count), []
    sample = jax.jit(build_sampler(network, replace(CLASSES, steps=steps, cfg_scale=cfg_scale), model.config),
                     compiler_options=network.inference_options())
    for start in range(0, count, size):      # batches of one size: one program
        numbers = np.arange(start, start + size, dtype=np.int32)
        images.append(np.asarray(sample(model.params, initial_noise(network, seed, numbers),
                                        {'label': numbers % network.null_label}, step_keys(seed, numbers))))
    return np.concatenate(images)[:count], np.arange(count) % network.null_label


def measure(model: Model, judge: Judge, steps: int = STEPS) -> dict[str, float]:
    """{'distance', 'accuracy', 'accuracy_unguided'} of a model, with so many sampling steps."""
    unguided, labels = draw(model, UNGUIDED, 1.0, steps=steps)
    guided, guided_labels = draw(model, GUIDED, CFG_SCALE, steps=steps)
    return {'distance': judge.distance(unguided), 'accuracy': judge.accuracy(guided, guided_labels),
            'accuracy_unguided': judge.accuracy(unguided, labels)}


def measure_folder(workdir: Path, steps: int, path: Path) -> dict[str, float]:
    """`measure` of the model in `path`, with the judge in `workdir`."""
    return measure(load(path, scan_layers=False), load_judge(workdir / 'judge.npz'), steps)


def tell(measured: Mapping[str, float]) -> str:
    """The figures of one model as a line."""
    return (f'Fréchet distance {measured["distance"]:.2f}, class accuracy '
            f'{measured["accuracy_unguided"]:.3f} ({measured["accuracy"]:.3f} with guidance)')


def real_figures(judge: Judge) -> dict[str, float]:
    """The judge's accuracy and the distance (its floor) of real held-out digits."""
    held_out = all_of(open_source('digits', split='held_out'))
    return {'judge_accuracy': judge.accuracy(held_out['image'], held_out['label']),
            'floor': judge.distance(held_out['image'])}


def summarise(teacher: Model, student: Model, runs: Mapping[str, list[dict]]) -> dict:
    """The table of the report, JSON-able: one row per kind of model, with means over its seeds."""
    rows = [row(name, student if name != 'teacher' else teacher, measured) for name, measured in runs.items()]
    for one in rows:
        for name in ('distance', 'accuracy', 'accuracy_unguided', 'steps'):
            one[f'{name}_ratio'] = one[name] / rows[0][name]
    return {'rows': rows, 'samples': {'unguided': UNGUIDED, 'guided': GUIDED, 'method': 'ddpm',
                                      'steps': STEPS, 'cfg_scale': CFG_SCALE}}


def row(name: str, model: Model, runs: list[dict]) -> dict:
    """A table row of one kind of model: size, cost, and the mean of each figure over its runs."""
    facts = {'name': name, 'steps': model.config['provenance']['step'], 'runs': runs,
             'parameters': count_parameters(model.network), 'macs': network_macs(model.network)}
    return facts | {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
