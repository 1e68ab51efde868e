"""Flows from noise (time 0) to data (time 1), x_t = α·data + σ·noise (SiT, REPA, LightningDiT): what a model
predicts, and the evaluations that make a sampler's steps."""
import math
from typing import NamedTuple

import numpy as np

METHODS = 'euler', 'heun', 'heun2', 'sde', 'sde_heun', 'dpm++'


class Row(NamedTuple):
    """An evaluation of the model at the time `time`, guided as of `decided`. In the first of a step,
    x = base + before·noise, which becomes the base. With k = of_x·x + of_output·output,
    x = keep·base + now·k + earlier·(k of the evaluation before) + after·noise. ends: a step ends here."""
    time: float
    decided: float
    of_x: float
    of_output: float
    now: float
    keep: float = 1.0
    earlier: float = 0.0
    before: float = 0.0
    after: float = 0.0
    ends: bool = True


def coefficients(path, t):
    """(α, α', σ, σ') at the time t."""
    t = np.float64(t)
    if path == 'linear':
        return t, np.float64(1), 1 - t, np.float64(-1)
    if path == 'vp':
        left, low, high = 1 - t, 0.1, 20.0
        log_alpha = -0.25 * left ** 2 * (high - low) - 0.5 * left * low
        half_beta = 0.5 * (low + left * (high - low))
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        return alpha, half_beta * alpha, sigma, -half_beta * alpha ** 2 / sigma
    angle, speed = t * math.pi / 2, math.pi / 2      # gvp; REPA calls it cosine
    return np.sin(angle), speed * np.cos(angle), np.cos(angle), -speed * np.sin(angle)


def conversion(flow, t, wanted):
    """(a, b) with wanted = a·x_t + b·(the model's prediction): velocity, noise, clean or score, -noise/σ."""
    given = flow['prediction']
    if given == wanted:
        return 0.0, 1.0
    alpha, d_alpha, sigma, d_sigma = coefficients(flow['path'], t)
    parts = {'velocity': (d_alpha, d_sigma), 'noise': (0.0, 1.0), 'score': (0.0, 1.0), 'clean': (1.0, 0.0)}
    (p, q), (r, s) = parts[given], parts[wanted]
    turn = p * sigma - q * alpha
    a, b = (p * s - q * r) / turn, (r * sigma - s * alpha) / turn
    b = -sigma * b if given == 'score' else b
    return (-a / sigma, -b / sigma) if wanted == 'score' else (a, b)


def times(flow, steps, shift=1.0):
    """steps + 1 times from noise to data, where a prediction says something; shift > 1: more noisy ones."""
    start, end = 0.0, 1.0
    if flow['path'] == 'vp':
        end = 1 - 1e-3
    elif flow['prediction'] != 'velocity':
        start, end = 1e-3, 1 - 1e-3
    t = np.linspace(start, end, steps + 1)
    return 1 - shifted(1 - t, shift) if shift != 1 else t


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_rows(flow, method, steps, shift=1.0, sde_form='sigma', sde_norm=1.0, last_step='mean',
              last_size=0.04):
    """The evaluations of a method, from noise to data."""
    def velocity(t):
        return conversion(flow, t, 'velocity')

    if method == 'dpm++':
        return _multistep(flow, steps, shift)
    if method in ('euler', 'heun', 'heun2'):
        return _solve(velocity, times(flow, steps, shift), method)
    if method not in METHODS:
        raise ValueError(f'unknown method {method}; known: {", ".join(METHODS)}')

    def amount(t):
        return diffusion_forms(flow['path'], t, sde_norm)[sde_form]

    def drift(t):
        score = conversion(flow, t, 'score')
        return tuple(a + amount(t) * b for a, b in zip(velocity(t), score, strict=True))

    with np.errstate(all='ignore'):
        t = times(flow, steps)
        if last_step != 'none':
            t = np.linspace(t[0], 1 - last_size, steps)
        rows = _solve(drift, t, method, amount)
    if not np.isfinite(np.array(rows, float)).all():
        raise ValueError(f'the form {sde_form} is not finite for this model; take sigma, and a last step')
    if last_step == 'tweedie':
        rows.append(Row(t[-1], t[-1], *conversion(flow, t[-1], 'clean'), 1.0, keep=0.0))
    elif last_step != 'none':
        rows.append(Row(t[-1], t[-1], *(drift if last_step == 'mean' else velocity)(t[-1]), last_size))
    return rows


def diffusion_forms(path, t, norm):
    """SiT's forms of the diffusion of the SDE."""
    alpha, d_alpha, sigma, d_sigma = coefficients(path, t)
    return {'constant': norm, 'sbdm': norm * (d_alpha / alpha * sigma ** 2 - sigma * d_sigma),
            'sigma': norm * sigma, 'linear': norm * (1 - t),
            'decreasing': 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
            'increasing_decreasing': norm * np.sin(np.pi * t) ** 2}


def _solve(drift, t, method, amount=None):
    """Steps of Euler, or of Heun (two evaluations; `heun` one in its last step), along the drift."""
    rows = []
    for number, (a, b) in enumerate(zip(t[:-1], t[1:], strict=True)):
        noise = 0.0 if amount is None else np.sqrt(2 * amount(a) * (b - a))
        if method in ('euler', 'sde') or method == 'heun' and number == len(t) - 2:
            rows.append(Row(a, a, *drift(a), b - a, after=noise))
            continue
        rows.append(Row(a, a, *drift(a), b - a, before=noise, ends=False))
        rows.append(Row(b, a if method == 'heun' else b, *drift(b), (b - a) / 2, earlier=(b - a) / 2))
    return rows


def _multistep(flow, steps, shift):
    """DPM-Solver++(2M) at the times of diffusers' flow sigmas; the model sees whole thousandths."""
    sigmas = shifted(1 - np.linspace(1, 1 / 1000, steps + 1), shift)[:0:-1]
    levels = [coefficients(flow['path'], 1 - sigma) for sigma in sigmas]
    alpha, sigma = np.array([(level[0], level[2]) for level in levels]).T
    alpha, sigma = np.append(alpha, 1.0), np.append(sigma, 0.0)
    growth, rows = np.diff(np.log(alpha[:-1] / sigma[:-1])), []
    for i in range(steps):
        ratio = sigma[i + 1] / sigma[i]
        gain, slope = alpha[i + 1] - ratio * alpha[i], 0.0
        if 0 < i < steps - 1:
            slope = growth[i] / (2 * growth[i - 1])
        seen = 1 - np.floor(1000 * sigmas[i]) / 1000
        rows.append(Row(seen, seen, *conversion(flow, 1 - sigmas[i], 'clean'), gain * (1 + slope), keep=ratio,
                        earlier=-gain * slope))
    return rows


def model_time(flow, t):
    """The model's time of the time t."""
    return 1 - t if flow['noise_at'] else t


def prediction(flow, output, channels):
    """The prediction along the path: the first channels, a velocity to the noise turned round."""
    output = output[:, :channels]
    return -output if flow['noise_at'] and flow['prediction'] == 'velocity' else output
