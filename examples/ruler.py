"""Measures models of digits: Fréchet distance and class accuracy by a judge, a classifier of real digits.

The distance is in the judge's 48 features, of unguided samples to the real training split. All models draw
from the same noise and labels."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from lit_jax.checkpoint.load import load
from lit_jax.data.sources import open_source
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.diffusion.settings import CLASSES, SamplerSettings
from lit_jax.metrics.toys.digits_judge import Judge, load_judge, open_mnist_judge, train_judge
from lit_jax.models.cost import network_macs
from lit_jax.models.network import Model, count_parameters
from lit_jax.report.grids import to_uint8
from lit_jax.sampling.noise import initial_noise, step_keys
from lit_jax.sampling.program import build_sampler

# Samples for the distance: it varies by a tenth with 2000, a third with 1000.
COUNT, BATCH, SEED = 2_000, 250, 1234


@dataclass(frozen=True)
class Ruler:
    """How the models of one demo are measured; picklable.

    Attributes:
        data: 'digits', whose judge is trained in `workdir`, or 'mnist', whose judge ships.
        settings: of the sampler, without guidance; a flow is drawn with `euler` and as many steps.
        guided: samples with guidance 2 for `accuracy`, or 0."""
    data: str
    workdir: Path
    settings: SamplerSettings
    guided: int = 0

    def judge(self) -> Judge:
        if self.data == 'mnist':
            return open_mnist_judge()
        path = self.workdir / 'judge.npz'
        if not path.exists():
            data = everything(self.data, 'train')
            train_judge(data['image'], data['label']).save(path)
        return load_judge(path)

    def labels(self) -> np.ndarray:
        """int32 [COUNT]: those of the held-out digits, if they are as many, else as many of each class."""
        held_out = everything(self.data, 'held_out')['label']
        if len(held_out) == COUNT:
            return np.random.default_rng(SEED).permutation(held_out)
        return np.arange(COUNT, dtype=np.int32) % 10

    def measure(self, path: Path, shown: Path | None = None) -> dict[str, float]:
        """{'distance', 'kid', 'accuracy_unguided', with `guided` also 'accuracy'} of the model in `path`.
        shown: where to keep some of the samples, see `first_of_each`."""
        model, judge, labels = load(path, scan_layers=False), self.judge(), self.labels()
        settings = settings_of(model, self.settings)
        images = draw(model, labels, settings)
        if shown is not None:
            np.save(shown, to_uint8(images[first_of_each(labels)]))
        measured = {'distance': judge.distance(images), 'kid': judge.kernel_distance(images),
                    'accuracy_unguided': judge.accuracy(images, labels)}
        if self.guided:
            some = labels[:self.guided]
            guided = draw(model, some, replace(settings, cfg_scale=2.0))
            measured['accuracy'] = judge.accuracy(guided, some)
        return measured

    def few(self, path: Path, steps: Sequence[int]) -> dict[int, float]:
        """{steps: distance} of samples with so many evaluations of the model."""
        model, judge, labels = load(path, scan_layers=False), self.judge(), self.labels()
        settings = settings_of(model, self.settings)
        return {n: judge.distance(draw(model, labels, replace(settings, steps=n))) for n in steps}

    def real(self) -> dict[str, float]:
        """Of real held-out digits: the judge's accuracy, and their distance (the floor of a model's, where
        they are as many as the samples)."""
        held_out, judge = everything(self.data, 'held_out'), self.judge()
        return {'judge_accuracy': judge.accuracy(held_out['image'], held_out['label']),
                'floor': judge.distance(held_out['image']), 'held_out': len(held_out['image'])}


DIGITS = replace(CLASSES, steps=50, cfg_scale=1.0)
MNIST = replace(CLASSES, steps=25, cfg_scale=1.0)      # half the time, for many students


def settings_of(model: Model, settings: SamplerSettings = MNIST) -> SamplerSettings:
    """The settings, of a flow with `euler`, which evaluates the model as often."""
    flow = read_diffusion(model.config['diffusion']).kind == 'flow'
    return replace(settings, method='euler') if flow else settings


def everything(data: str, split: str) -> dict[str, np.ndarray]:
    """All examples of a small data set."""
    source = open_source(data, split=split)
    return source.take(range(len(source)))


def first_of_each(labels: np.ndarray, rows: int = 3) -> np.ndarray:
    """Which of these examples make a grid with a class in each of ten columns."""
    return np.stack([np.flatnonzero(labels == c)[:rows] for c in range(10)], axis=1).ravel()


def draw(model: Model, labels: np.ndarray, settings: SamplerSettings, seed: int = SEED) -> np.ndarray:
    """One image float32 [N, H, W, 1] a label; the same noise for all models."""
    network, size, images = model.network, min(BATCH, len(labels)), []
    sample = jax.jit(build_sampler(network, settings, model.config),
                     compiler_options=network.inference_options())
    for start in range(0, len(labels), size):      # batches of one size: one program
        numbers = np.arange(start, start + size, dtype=np.int32)
        images.append(np.asarray(sample(model.params, initial_noise(network, seed, numbers),
                                        {'label': np.resize(labels[start:start + size], size)},
                                        step_keys(seed, numbers))))
    return np.concatenate(images)[:len(labels)]


def tell(measured: Mapping[str, float]) -> str:
    """The figures of one model as a line."""
    guided = f' ({measured["accuracy"]:.3f} with guidance)' if 'accuracy' in measured else ''
    return (f'Fréchet distance {measured["distance"]:.2f}, class accuracy '
            f'{measured["accuracy_unguided"]:.3f}{guided}')


def row(name: str, model: Model, runs: list[dict]) -> dict:
    """A table row of one kind of model: size, cost, and the mean of each figure over its runs."""
    facts = {'name': name, 'steps': model.config['provenance']['step'], 'runs': runs,
             'parameters': count_parameters(model.network), 'macs': network_macs(model.network)}
    return facts | {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
