"""Noise schedule, samplers and guidance, and the command line."""
import argparse
import json
import pathlib

import numpy as np
import torch

from lit_jax.convert.twins.models_twin import MODELS


def make_levels(steps, train_steps):
    """(timesteps, ᾱ) of `steps` evenly spaced timesteps, the noisiest first, in float64."""
    betas = np.linspace(1e-4, 2e-2, train_steps) * (1000 / train_steps)
    stride, position, kept = (train_steps - 1) / max(steps - 1, 1), 0.0, []
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return np.array(kept[::-1]), np.cumprod(1 - betas)[kept[::-1]]


def guided(model, condition, null, scale, channels=3):
    """f(x, t) -> output with classifier-free guidance of the first channels of the noise ('all': of each)."""
    def call(x, t):
        t = torch.full((len(x),), t, device=x.device)
        if scale == 1:
            return model(x, t, *condition)
        both = [torch.cat(pair) for pair in zip(condition, null, strict=True)]
        given, without = model(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        count = x.shape[1] if channels == 'all' else min(channels, x.shape[1])
        noise = without[:, :count] + scale * (given[:, :count] - without[:, :count])
        return torch.cat([noise, given[:, count:]], 1)
    return call


@torch.no_grad()
def sample(predict, x, method='ddpm', steps=50, train_steps=1000, generator=None, clip=False, noise=None,
           callback=None):
    """Noise x [B, C, H, W] -> x0. predict(x, t) -> [B, C or 2C, H, W]. method: ddpm, ddim or dpm++.

    noise: [steps, B, C, H, W] of ddpm in the place of the generator. callback(x) sees each state."""
    solve = {'ddpm': ancestral, 'ddim': deterministic, 'dpm++': multistep}
    if method not in solve:
        raise SystemExit(f'unknown method {method}; known: {", ".join(solve)}')
    timesteps, levels = make_levels(steps + (method == 'dpm++'), train_steps)
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


def load(folder):
    """(model, config) of a folder with config.json and model.safetensors."""
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    config = json.loads((folder / 'config.json').read_text())
    model = MODELS[config['model']['family']](config['model'])
    state = load_file(folder / 'model.safetensors')
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {'y_embedder.y_embedding'}:
        raise SystemExit(f'{folder}: missing {missing}, unexpected {unexpected}')
    return model.eval(), config


def to_pixels(x0, config, vae):
    """x0 -> uint8 [B, H, W, C], through diffusers' AutoencoderKL where the model draws latents."""
    latent = config['latent']
    x0 = x0 / latent['scale'] + (latent.get('shift') or 0)
    if latent['space'] != 'pixels':
        if not vae:
            raise SystemExit(f'this model draws latents of the VAE {latent.get("vae")}: give its folder of '
                             'diffusers, --vae FOLDER')
        from diffusers import AutoencoderKL
        decoder = AutoencoderKL.from_pretrained(vae, local_files_only=True).to(x0.device).eval()
        with torch.no_grad():
            x0 = decoder.decode(x0.float()).sample
    pixels = (x0.float().clip(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def parse_arguments(config):
    told, parser = config.get('sampling') or {}, argparse.ArgumentParser(description='Draws images.')
    parser.add_argument('--classes', help='names or numbers of classes, such as 3,7')
    parser.add_argument('--features', help='.npy with the text encoder\'s features of the prompts [B, L, C]')
    parser.add_argument('--steps', type=int, default=told.get('steps', 50))
    parser.add_argument('--method', default=told.get('method', 'ddpm'), choices=('ddpm', 'ddim', 'dpm++'))
    parser.add_argument('--cfg_scale', type=float, default=told.get('cfg_scale', 4.0))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--vae', help='folder of an AutoencoderKL of diffusers')
    parser.add_argument('--out', default='samples.png')
    return parser.parse_args()


def conditions(arch, classes, options, model, device):
    """(condition, null condition): the arguments of the model after x and t."""
    if arch['family'] == 'pixart':
        if not options.features:
            raise SystemExit('give --features, the text encoder\'s features of the prompts [B, L, C]')
        y = torch.from_numpy(np.load(options.features, allow_pickle=False)).float().to(device)
        return (y,), (model.y_embedder.y_embedding.expand(len(y), -1, -1),)
    numbers = {name: number for number, name in enumerate(classes or ())}
    labels = [int(part) if part.isdigit() else numbers.get(part, -1)
              for part in map(str.strip, (options.classes or '0').split(','))]
    if not all(0 <= label < arch['num_classes'] for label in labels):
        raise SystemExit(f'--classes {options.classes}: this model has 0 to {arch["num_classes"] - 1}')
    y = torch.tensor(labels, device=device)
    return (y,), (torch.full_like(y, arch['num_classes']),)


def main():
    folder = pathlib.Path(__file__).parent
    options = parse_arguments(json.loads((folder / 'config.json').read_text()))
    model, config = load(folder)
    arch, model = config['model'], model.to(options.device)
    given, null = conditions(arch, config.get('classes'), options, model, options.device)
    scale = options.cfg_scale if arch.get('null_class', True) else 1
    predict = guided(model, given, null, scale, 'all' if arch['family'] == 'pixart' else 3)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    shape = len(given[0]), arch['channels'], *arch['input_size']
    x = torch.randn(shape, generator=generator, device=options.device)
    x0 = sample(predict, x, options.method, options.steps, config['diffusion']['steps'], generator)
    images = to_pixels(x0, config, options.vae)
    from PIL import Image
    row = np.concatenate(list(images), 1)
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(options.out)
    print(f'{len(images)} images of {images.shape[1]} x {images.shape[2]} pixels: {options.out}')


if __name__ == '__main__':
    main()
