"""Guidance, and the command line."""
import argparse
import json
import pathlib

import numpy as np
import torch

from lit_jax.convert.twins.models_twin import MODELS
from lit_jax.convert.twins.noise_twin import KNOWN, SAMPLERS, add_arguments, guided_times, sample

UNUSED = 'projectors.', 'feat_rope.'      # tensors that feed no sample: REPA's, and tables that are computed


def guided(model, condition, null, scale, channels=3, interval=None):
    """f(x, t) -> output with classifier-free guidance of the first channels of the prediction ('all': of
    each). interval: (low, high), where the model's time or `decided`, the third argument, lies if it acts."""
    def call(x, t, decided=None):
        t, decided = spread(x, t), spread(x, t if decided is None else decided)
        acts = None if interval is None else (decided >= interval[0]) & (decided <= interval[1])
        if scale == 1 or acts is not None and not acts.any():
            return model(x, t, *condition)
        both = [torch.cat(pair) for pair in zip(condition, null, strict=True)]
        given, without = model(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        count = x.shape[1] if channels == 'all' else min(channels, x.shape[1])
        noise = without[:, :count] + scale * (given[:, :count] - without[:, :count])
        if acts is not None:
            noise = torch.where(acts[:, None, None, None], noise, given[:, :count])
        return torch.cat([noise, given[:, count:]], 1)
    return call


def spread(x, t):
    """A time of each image: whole timesteps as they are, fractions in float32 at least."""
    if isinstance(t, int):
        return torch.full((len(x),), t, device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x))


def load(folder):
    """(model, config) of a folder with config.json and model.safetensors."""
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    config = json.loads((folder / 'config.json').read_text())
    model = MODELS[config['model']['family']](config['model'])
    state = {name: value for name, value in load_file(folder / 'model.safetensors').items()
             if not name.startswith(UNUSED)}
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
    """(options, names of those of the samplers alone)."""
    text = config['model']['family'] == 'pixart'
    usual = {'method': 'dpm++', 'steps': 20, 'cfg_scale': 4.5, 'cfg_channels': 'all'} if text else KNOWN
    told = {**usual, **(config.get('sampling') or {})}
    parser = argparse.ArgumentParser(description='Draws images.')
    parser.add_argument('--classes', help='names or numbers of classes, such as 3,7')
    parser.add_argument('--features', help='.npy with the text encoder\'s features of the prompts [B, L, C]')
    parser.add_argument('--steps', type=int, default=told['steps'])
    parser.add_argument('--method', default=told['method'], choices=SAMPLERS)
    parser.add_argument('--cfg_scale', type=float, default=told['cfg_scale'])
    parser.add_argument('--cfg_channels', type=lambda word: word if word == 'all' else int(word),
                        default=told.get('cfg_channels', 3))
    parser.add_argument('--cfg_interval', type=float, nargs=2, metavar=('LOW', 'HIGH'))
    own = add_arguments(parser)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--vae', help='folder of an AutoencoderKL of diffusers')
    parser.add_argument('--out', default='samples.png')
    return parser.parse_args(), own


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
    options, own = parse_arguments(json.loads((folder / 'config.json').read_text()))
    model, config = load(folder)
    arch, model = config['model'], model.to(options.device)
    given, null = conditions(arch, config.get('classes'), options, model, options.device)
    scale = options.cfg_scale if arch.get('null_class', True) else 1
    interval = options.cfg_interval and guided_times(config['diffusion'], *options.cfg_interval)
    predict = guided(model, given, null, scale, options.cfg_channels, interval)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    shape = len(given[0]), arch['channels'], *arch['input_size']
    x = torch.randn(shape, generator=generator, device=options.device)
    try:
        x0 = sample(predict, x, options.method, options.steps, config['diffusion'], generator,
                    **{name: getattr(options, name) for name in own})
    except ValueError as error:      # options that do not go together
        raise SystemExit(f'{error}') from None
    images = to_pixels(x0, config, options.vae)
    from PIL import Image
    row = np.concatenate(list(images), 1)
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(options.out)
    print(f'{len(images)} images of {images.shape[1]} x {images.shape[2]} pixels: {options.out}')


if __name__ == '__main__':
    main()
