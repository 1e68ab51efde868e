"""Paths from noise to data, x_t = α_t·data + σ_t·noise, and the one conversion between what models predict.

Time runs from noise (t = 0) to data (t = 1), as in SiT (arXiv 2401.08740, code); ' is d/dt. All functions
take numpy arrays (float64) as well as jax arrays, and any shape of t. The predictions, each of which gives
the others at the same x_t and t:

    velocity   v = α'·data + σ'·noise
    noise      ε
    clean      the data
    score      s = -ε/σ
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

BETA = 0.1, 20.0       # of vp: β at the data and at the noise


@dataclass(frozen=True)
class Coefficients:
    """α, α', σ and σ' of a path at some times."""
    alpha: Any
    d_alpha: Any
    sigma: Any
    d_sigma: Any

    @property
    def growth(self):
        """α'/α."""
        return self.d_alpha / self.alpha

    @property
    def spread(self):
        """λ = (α'/α)·σ² - σσ', SiT's variance of the drift: v = (α'/α)·x + λ·s."""
        return self.growth * self.sigma ** 2 - self.sigma * self.d_sigma


def _linear(t, xp) -> Coefficients:
    one = xp.ones_like(t)
    return Coefficients(t, one, 1 - t, -one)


def _trigonometric(t, xp) -> Coefficients:
    angle, speed = t * (math.pi / 2), math.pi / 2
    return Coefficients(xp.sin(angle), speed * xp.cos(angle), xp.cos(angle), -speed * xp.sin(angle))


def _variance_preserving(t, xp) -> Coefficients:
    low, high = BETA
    left = 1 - t
    log_alpha = -0.25 * left ** 2 * (high - low) - 0.5 * left * low
    half_beta = 0.5 * (low + left * (high - low))
    # 1 - α² loses its digits near the data.
    alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
    return Coefficients(alpha, half_beta * alpha, sigma, -half_beta * alpha ** 2 / sigma)


def _time_of_linear(ratio, xp):
    return 1 / (1 + ratio)


def _time_of_trigonometric(ratio, xp):
    return 1 - (2 / math.pi) * xp.arctan(ratio)


def _time_of_preserving(ratio, xp):
    low, high = BETA
    # ¼(high - low)·u² + ½·low·u = ½·log(1 + ratio²), u = 1 - t
    slope, target = high - low, 0.5 * xp.log1p(ratio ** 2)
    return 1 - 2 * (xp.sqrt((0.5 * low) ** 2 + slope * target) - 0.5 * low) / slope


@dataclass(frozen=True)
class Path:
    """at: (t, numpy or jax.numpy) -> Coefficients. time_of: σ/α -> t. whole: whether a velocity is finite on
    all of [0, 1]."""
    at: Callable[[Any, Any], Coefficients]
    time_of: Callable[[Any, Any], Any]
    whole: bool = True


_GVP = Path(_trigonometric, _time_of_trigonometric)
# SiT's three; REPA's `cosine` is `gvp` under another name.
PATHS: Mapping[str, Path] = {'linear': Path(_linear, _time_of_linear), 'gvp': _GVP, 'cosine': _GVP,
                             'vp': Path(_variance_preserving, _time_of_preserving, whole=False)}
PREDICTIONS = 'velocity', 'noise', 'clean', 'score'


def coefficients(path: str, t) -> Coefficients:
    """Those of a path of PATHS at t, in the dtype of t (numpy: float64)."""
    if isinstance(t, np.ndarray | float | int):
        return PATHS[path].at(np.asarray(t, np.float64), np)
    return PATHS[path].at(t, jnp)


def prediction_weights(c: Coefficients, given: str, wanted: str) -> tuple[Any, Any]:
    """(a, b) with wanted = a·x_t + b·given: the conversion between two predictions of PREDICTIONS.

    It is exact wherever it is finite; each prediction says nothing at one end of the path or the other (the
    noise at t = 0 of a linear path, say), where a or b divides by 0."""
    if given == wanted:
        return 0.0 * c.alpha, 1.0 + 0.0 * c.alpha
    data, noise = _solved(c, given)
    parts = {'velocity': (c.d_alpha, c.d_sigma), 'noise': (0.0, 1.0), 'clean': (1.0, 0.0)}
    if wanted == 'score':
        return -noise[0] / c.sigma, -noise[1] / c.sigma
    of_data, of_noise = parts[wanted]
    return of_data * data[0] + of_noise * noise[0], of_data * data[1] + of_noise * noise[1]


def _solved(c: Coefficients, given: str) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(a, b) of data = a·x_t + b·given, and of the noise."""
    one, zero = 1.0 + 0.0 * c.alpha, 0.0 * c.alpha
    if given == 'velocity':
        turn = c.d_alpha * c.sigma - c.alpha * c.d_sigma       # 1 on the linear path
        return (-c.d_sigma / turn, c.sigma / turn), (c.d_alpha / turn, -c.alpha / turn)
    if given == 'clean':
        return (zero, one), (1 / c.sigma, -c.alpha / c.sigma)
    if given == 'noise':
        return (1 / c.alpha, -c.sigma / c.alpha), (zero, one)
    return (1 / c.alpha, c.sigma ** 2 / c.alpha), (zero, -c.sigma)


def convert_prediction(c: Coefficients, x_t, output, given: str, wanted: str):
    """The output of a model that predicts `given`, as one of `wanted`. c broadcasts against x_t."""
    if given == wanted:
        return output
    a, b = prediction_weights(c, given, wanted)
    return a * x_t + b * output


def shifted(sigma, shift: float):
    """Times of noise moved towards 1 by shift > 1: s·σ/(1 + (s - 1)·σ). LightningDiT's s, of times of data,
    is 1/shift."""
    return shift * sigma / (1 + (shift - 1) * sigma)
