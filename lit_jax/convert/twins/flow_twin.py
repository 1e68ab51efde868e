"""Samplers of flows."""
import numpy as np
import torch

from lit_jax.convert.twins.flow_rows_twin import (
    METHODS,
    conversion,
    make_rows,
    model_time,
    prediction,
    times,
)

KNOWN = {'steps': 50, 'cfg_scale': 4.0, 'method': 'euler'}
SAMPLERS = *METHODS, 'dopri5'
OPTIONS = {'shift': 1.0, 'sde_form': 'sigma', 'sde_norm': 1.0, 'last_step': 'mean', 'last_size': 0.04}
CHOICES = {'sde_form': ('constant', 'sbdm', 'sigma', 'linear', 'decreasing', 'increasing_decreasing'),
           'last_step': ('mean', 'euler', 'tweedie', 'none')}


@torch.no_grad()
def sample(predict, x, method='euler', steps=50, diffusion=None, generator=None, noise=None, callback=None,
           tolerance=1e-3, **options):
    """Noise x [B, C, H, W] -> x0. predict(x, t, decided) -> [B, C or 2C, H, W]. options: of OPTIONS.

    noise: [steps, B, C, H, W] of sde and sde_heun in the place of the generator. callback(x) sees the state
    after each step."""
    flow = {'path': 'linear', 'prediction': 'velocity', 'noise_at': 0, **(diffusion or {})}
    if method == 'dopri5':
        return adaptive(predict, x, flow, steps, tolerance)
    step, k, z, base = 0, torch.zeros_like(x), None, x
    rows = make_rows(flow, method, steps, **options)
    random = any(row.before or row.after for row in rows)
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1].ends:      # a step starts
            if random:
                z = noise[step] if noise is not None else torch.randn(
                    x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = x + float(row.before) * z
            base, step = x, step + 1
        output = predict(x, model_time(flow, row.time), model_time(flow, row.decided))
        output, before = prediction(flow, output.to(x.dtype), x.shape[1]), k
        k = float(row.of_x) * x + float(row.of_output) * output
        x = float(row.keep) * base + float(row.now) * k + float(row.earlier) * before
        if random:
            x = x + float(row.after) * z
        if callback is not None and row.ends:
            callback(x)
    return x


# Dormand & Prince 1980: times and weights of the stages; the last row is the fifth-order result.
STAGE_TIMES = 0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1
STAGES = (
    (), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
FOURTH = 5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40


def adaptive(predict, x, flow, most, tolerance):
    """dopri5: steps of its own for each image, at most `most` of them, the last to the end."""
    start, end = times(flow, 1)

    def wide(values):
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def velocity(x, t):
        numbers = np.array([conversion(flow, one, 'velocity') for one in t.tolist()])
        of_x, of_output = (wide(torch.as_tensor(part, dtype=x.dtype, device=x.device)) for part in numbers.T)
        seen = model_time(flow, t)
        return of_x * x + of_output * prediction(flow, predict(x, seen, seen).to(x.dtype), x.shape[1])

    t = torch.full((len(x),), start, dtype=x.dtype, device=x.device)
    slope, size = velocity(x, t), torch.full_like(t, 0.05 * (end - start))
    for count in range(1, most + 1):
        left = end - t
        if not (left > 0).any():
            break
        size = left if count == most else torch.minimum(size, left)
        slopes, h = [slope], wide(size)
        for number in range(1, 7):
            result = x + h * sum(weight * k for weight, k in zip(STAGES[number], slopes, strict=True))
            slopes.append(velocity(result, t + STAGE_TIMES[number] * size))
        error = h * sum((a - b) * k for a, b, k in zip((*STAGES[6], 0), FOURTH, slopes, strict=True))
        scale = tolerance * (1e-3 + torch.maximum(x.abs(), result.abs()))
        wrong = (error / scale).square().flatten(1).mean(1).sqrt()
        moved = ((wrong <= 1) | (count == most)) & (left > 0)
        t = torch.where(moved, torch.where(size >= left, torch.full_like(t, end), t + size), t)
        x, slope = torch.where(wide(moved), result, x), torch.where(wide(moved), slopes[6], slope)
        size = size * (0.9 * wrong.clip(1e-10) ** -0.2).clip(0.2, 10.0)
    return x


def guided_times(flow, low, high):
    """The model's times of a part of the schedule, from 0, image, to 1, noise."""
    return (low, high) if flow['noise_at'] else (1 - high, 1 - low)


def add_arguments(parser):
    """The options of OPTIONS and the tolerance of dopri5."""
    for name, value in OPTIONS.items():
        parser.add_argument(f'--{name}', type=type(value), default=value, choices=CHOICES.get(name))
    parser.add_argument('--tolerance', type=float, default=1e-3)
    return *OPTIONS, 'tolerance'
