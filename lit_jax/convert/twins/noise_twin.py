"""The noise schedule of DiT and its samplers."""
import numpy as np
import torch

KNOWN = {'steps': 50, 'cfg_scale': 4.0, 'method': 'ddpm'}
SAMPLERS = 'ddpm', 'ddim', 'dpm++'


def make_levels(steps, train_steps):
    """(timesteps, ᾱ) of `steps` evenly spaced timesteps, the noisiest first, in float64."""
    betas = np.linspace(1e-4, 2e-2, train_steps) * (1000 / train_steps)
    stride, position, kept = (train_steps - 1) / max(steps - 1, 1), 0.0, []
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return np.array(kept[::-1]), np.cumprod(1 - betas)[kept[::-1]]


@torch.no_grad()
def sample(predict, x, method='ddpm', steps=50, diffusion=None, generator=None, noise=None, callback=None,
           clip=False):
    """Noise x [B, C, H, W] -> x0. predict(x, t) -> [B, C or 2C, H, W]. method: ddpm, ddim or dpm++.

    noise: [steps, B, C, H, W] of ddpm in the place of the generator. callback(x) sees each state."""
    solve = {'ddpm': ancestral, 'ddim': deterministic, 'dpm++': multistep}
    if method not in solve:
        raise ValueError(f'unknown method {method}; known: {", ".join(solve)}')
    timesteps, levels = make_levels(steps + (method == 'dpm++'), (diffusion or {}).get('steps', 1000))
    before = None
    for i in range(steps):
        output = predict(x, int(timesteps[i])).to(x.dtype)
        eps = output[:, :x.shape[1]]
        x0 = np.sqrt(1 / levels[i]) * x - np.sqrt(1 / levels[i] - 1) * eps
        x0 = x0.clip(-1, 1) if clip else x0
        if method == 'ddpm' and noise is None and i < steps - 1:
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        else:
            z = noise[i] if noise is not None else None
        x = solve[method](x, x0, output, levels, i, steps, z, before)
        before = x0
        if callback is not None:
            callback(x)
    return x


def ancestral(x, x0, output, levels, i, steps, z, before):
    """DDPM, algorithm 2; the variance between that of the posterior and β, as the model says."""
    after = levels[i + 1] if i < steps - 1 else 1.0
    beta = 1 - levels[i] / after
    posterior = beta * (1 - after) / (1 - levels[i])
    mean = (beta * np.sqrt(after) * x0 + (1 - after) * np.sqrt(1 - beta) * x) / (1 - levels[i])
    if i == steps - 1:
        return mean
    low, high = np.log(posterior), np.log(beta)
    if output.shape[1] == x.shape[1]:      # a model that predicts no variance
        return mean + np.sqrt(beta) * z
    fraction = (output[:, x.shape[1]:] + 1) / 2
    return mean + torch.exp(0.5 * (fraction * high + (1 - fraction) * low)) * z


def deterministic(x, x0, output, levels, i, steps, z, before):
    """DDIM with eta 0 (arXiv 2010.02502, eq. 12)."""
    after = levels[i + 1] if i < steps - 1 else 1.0
    eps = (np.sqrt(1 / levels[i]) * x - x0) / np.sqrt(1 / levels[i] - 1)
    return np.sqrt(after) * x0 + np.sqrt(1 - after) * eps


def multistep(x, x0, output, levels, i, steps, z, before):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), the first and last step of first order."""
    alpha, sigma = np.append(np.sqrt(levels[:steps]), 1.0), np.append(np.sqrt(1 - levels[:steps]), 0.0)
    ratio = sigma[i + 1] / sigma[i]
    gain, slope = alpha[i + 1] - ratio * alpha[i], x0
    if 0 < i < steps - 1:
        growth = np.diff(np.log(alpha[i - 1:i + 2] / sigma[i - 1:i + 2]))
        slope = x0 + growth[1] / (2 * growth[0]) * (x0 - before)
    return ratio * x + gain * slope


def guided_times(diffusion, low, high):
    """The timesteps of a part of the schedule, from 0, image, to 1, noise."""
    last = diffusion['steps'] - 1
    return low * last, high * last


def add_arguments(parser):
    """These samplers have no options of their own."""
    return ()
