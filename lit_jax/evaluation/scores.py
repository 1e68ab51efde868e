"""Computes the scores of a set of features against a reference, and says why some cannot be computed."""
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lit_jax.evaluation.evaluate_options import METRICS, ScoreOptions
from lit_jax.evaluation.reference import Reference
from lit_jax.evaluation.spaces import FeatureSpace
from lit_jax.metrics import kernel
from lit_jax.metrics.features import Features
from lit_jax.metrics.frechet import Statistics, frechet_distance, statistics
from lit_jax.metrics.inception_score import (
    ADM_SPLIT,
    FIDELITY_SEED,
    FIDELITY_SPLITS,
    inception_score,
    sorted_by_class,
)
from lit_jax.metrics.kernel import kernel_distance
from lit_jax.metrics.manifold import MODES as PR_MODES
from lit_jax.metrics.manifold import density_coverage, precision_recall
from lit_jax.runtime.errors import UserError, did_you_mean

OF_IMAGES = ('kid', 'skid', 'precision', 'recall', 'density', 'coverage')    # need the reference's images
IS_MODES = ('adm', 'shuffled')
NEIGHBOURS = {'precision': 3, 'recall': 3, 'density': 5, 'coverage': 5}
_COLLAPSED = 0.9          # inception score in file order below this fraction of the shuffled one: sorted file


@dataclass(frozen=True)
class Settings:
    """Metrics and their variants; for pr_mode and is_mode see ScoreOptions."""
    metrics: tuple[str, ...] = ScoreOptions.metrics
    pr_mode: str = ScoreOptions.pr_mode
    is_mode: str = ScoreOptions.is_mode

    def check(self) -> 'Settings':
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f'unknown metric {", ".join(map(repr, unknown))}'
                            f'{did_you_mean(unknown[0], METRICS)}; known: {", ".join(METRICS)}')
        if not self.metrics:
            raise UserError(f'--metrics is empty; known: {", ".join(METRICS)}')
        for name, value, known in (('pr_mode', self.pr_mode, PR_MODES), ('is_mode', self.is_mode, IS_MODES)):
            if value not in known:
                raise UserError(f'unknown --{name}={value}; known: {", ".join(known)}')
        return self

    def facts(self) -> dict:
        """JSON-able, for the recipe card."""
        form = (f'no bias, chunks of {ADM_SPLIT} in file order (ADM)' if self.is_mode == 'adm' else
                f'no bias, {FIDELITY_SPLITS} chunks shuffled by seed {FIDELITY_SEED} (torch-fidelity)')
        return {'pr_mode': self.pr_mode, 'is_mode': self.is_mode, 'inception_score': form,
                'neighbours': NEIGHBOURS['recall'],
                'kid': {'subsets': kernel.SUBSETS, 'size': kernel.SUBSET_SIZE, 'seed': kernel.SEED}}


def few_images(who: str, known: Statistics) -> list[str]:
    """[a warning] about a covariance of so few images that it is singular, else []. who: begins it."""
    width = len(known.mean)
    if known.count is None or known.count > width:
        return []
    return [f'{who} for features of {width:,} dimensions: their covariance is singular, and a distance of it '
            f'says more of the number than of the images. Take more than {width:,}, at best 50,000, or read '
            f'kid']


class Scorer:
    """Scores features against one reference, whose statistics are computed once.

    features: of the reference's images, or None; `impossible` names the scores that need them."""

    def __init__(self, space: FeatureSpace, reference: Reference, features: Features | None,
                 settings: Settings):
        self._space, self._reference, self._features, self._settings = space, reference, features, settings

    def score(self, samples: Features, metrics: Sequence[str],
              labels: np.ndarray | None = None) -> tuple[dict, list[str]]:
        """({metric: value, 'is_std', ...}, notes for people). labels: in file order, if known."""
        scores, notes = {}, []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for name in metrics:
                if name not in scores:
                    scores |= self._one(name, samples, metrics, notes)
        notes += dict.fromkeys(str(warning.message) for warning in caught
                               if issubclass(warning.category, UserWarning))
        if 'is' in metrics:
            notes += self._sorted_note(samples, scores, labels)
        return scores, notes

    def _one(self, name: str, samples: Features, metrics: Sequence[str], notes: list[str]) -> dict:
        if name in ('fid', 'sfid'):
            kind = 'pool' if name == 'fid' else 'spatial'
            drawn, real = self._statistics_of(samples, kind), self._real[kind]
            for who, known in (('samples', drawn), ('images in the reference', real)):
                notes += few_images(f'{name}: only {known.count} {who}', known)
            return {name: frechet_distance(drawn, real)}
        if name == 'is':
            return self._inception_score(samples, self._settings.is_mode)
        if name in ('kid', 'skid'):
            return self._kernel(name, samples, notes)
        if name in ('precision', 'recall'):
            found = precision_recall(samples.pool, self._features.pool, neighbours=NEIGHBOURS[name],
                                     mode=self._settings.pr_mode)
            return {key: float(getattr(found, key)) for key in ('precision', 'recall') if key in metrics}
        found = density_coverage(samples.pool, self._features.pool, neighbours=NEIGHBOURS[name])
        return {key: float(value) for key, value in zip(('density', 'coverage'), found, strict=True)
                if key in metrics}

    @cached_property
    def _real(self) -> dict[str, Statistics]:
        if self._reference.statistics:
            return self._reference.statistics
        return {kind: self._statistics_of(self._features, kind) for kind in ('pool', 'spatial')
                if getattr(self._features, kind) is not None}

    def _statistics_of(self, features: Features, kind: str) -> Statistics:
        return statistics(getattr(features, kind), float32_mean=self._space.adm)

    def _inception_score(self, samples: Features, mode: str) -> dict:
        options = {'split_size': ADM_SPLIT}
        if mode == 'shuffled':
            options = {'splits': min(FIDELITY_SPLITS, len(samples.pool)), 'shuffle_seed': FIDELITY_SEED}
        mean, std = inception_score(samples.pool, self._space.head, **options)
        return {'is': mean, 'is_std': std}

    def _kernel(self, name: str, samples: Features, notes: list[str]) -> dict:
        kind = 'pool' if name == 'kid' else 'spatial'
        ours, real = getattr(samples, kind), getattr(self._features, kind)
        size = min(kernel.SUBSET_SIZE, len(ours), len(real))
        if size < kernel.SUBSET_SIZE:
            notes.append(f'{name}: subsets of {size} images instead of {kernel.SUBSET_SIZE}: there are '
                         'no more')
        mean, std = kernel_distance(ours, real, subset_size=size)
        return {name: mean, f'{name}_std': std}

    def _sorted_note(self, samples: Features, scores: dict, labels: np.ndarray | None) -> list[str]:
        """A warning if the file is sorted by class: its chunks then have too few classes for this score."""
        if self._settings.is_mode != 'adm' or len(samples.pool) <= ADM_SPLIT:
            return []
        shuffled = self._inception_score(samples, 'shuffled')['is']
        if (labels is None or not sorted_by_class(labels)) and scores['is'] >= _COLLAPSED * shuffled:
            return []
        return [f'is: the images are sorted by class: {scores["is"]:.2f} in file order, {shuffled:.2f} '
                f'shuffled (--is_mode=shuffled)']


def impossible(metrics: Sequence[str], space: FeatureSpace, reference: Reference,
               count: int) -> dict[str, str]:
    """{metric: why it cannot be computed} for `count` samples."""
    return {name: reason for name in metrics if (reason := _obstacle(name, space, reference, count))}


def _obstacle(name: str, space: FeatureSpace, reference: Reference, count: int) -> str:
    images = reference.images
    if name in ('sfid', 'skid') and not space.widths[1]:
        return f'{space.facts["flavour"]} has no spatial features'
    if name == 'is' and space.head is None:
        return f'{space.facts["flavour"]} does not classify'
    if name in OF_IMAGES and images is None:
        return f'{reference.path} has statistics only; this score needs images of the reference (arr_0)'
    if name == 'sfid' and reference.statistics and 'spatial' not in reference.statistics:
        return f'{reference.path} has no statistics of spatial features (mu_s, sigma_s)'
    if name in NEIGHBOURS and min(count, images.count) <= NEIGHBOURS[name]:
        return f'it uses {NEIGHBOURS[name]} neighbours, so each set needs more images than that'
    least = 1 if name == 'is' else 2
    if count < least or (name != 'is' and not reference.statistics and images.count < least):
        return f'it needs at least {least} images in each set'
    return ''
