"""Times the full autoencoder of Stable Diffusion: ours, jitted, against diffusers' AutoencoderKL.

    PYTHONPATH=tests python -m benchmarks.vae                            # 256 pixels, about 3 minutes
    PYTHONPATH=tests python -m benchmarks.vae --threads 1 --clock cpu    # on a busy machine

All have the same random weights and take turns on the same cores; the results are compared first. The tables
have medians and minima, and our time over that of the faster PyTorch, which runs eagerly in both layouts,
NCHW and channels_last. float32 on a CPU, bfloat16 on a GPU.
"""
import statistics

from benchmarks.timing import add_clock, check_same, make_parser, set_clock, take_turns

WIDTHS = (128, 256, 512, 512)
PASSES = ('encode', 'decode')


def torch_vae(device: str, dtype):
    """diffusers' class with small random weights, so that nothing overflows."""
    import torch
    from torchvision_shim import import_oracle
    AutoencoderKL = import_oracle('diffusers').AutoencoderKL
    torch.manual_seed(0)
    blocks = {'down_block_types': ['DownEncoderBlock2D'] * 4, 'up_block_types': ['UpDecoderBlock2D'] * 4}
    vae = AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=2, latent_channels=4, **blocks)
    return vae.to(device, dtype).eval()


def torch_calls(vae, image, latent, channels_last: bool) -> dict:
    """{'encode': call, 'decode': call} of images [B, C, H, W]."""
    import torch
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device, dtype = vae.device, vae.dtype
    image, latent = (torch.from_numpy(a).to(device, dtype).to(memory_format=layout) for a in (image, latent))

    def call(function):
        def run():
            with torch.no_grad():
                vae.to(memory_format=layout)      # has no effect from the second call of a turn on
                result = function()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            return result
        return run

    return {'encode': call(lambda: vae.encode(image).latent_dist.mean),
            'decode': call(lambda: vae.decode(latent).sample)}


def our_calls(state, image, latent, dtype) -> dict:
    """The same two calls of lit_jax, on images [B, H, W, C]."""
    import jax

    from lit_jax.convert.torch_files import source_from_arrays
    from lit_jax.convert.vae_torch import read_vae_params
    from lit_jax.models.vae import VaeNetwork
    network = VaeNetwork({'widths': WIDTHS}, dtype=dtype)
    params = jax.device_put(read_vae_params(source_from_arrays(state), network.arch, 'the random VAE'))
    image, latent = (jax.device_put(a.transpose(0, 2, 3, 1)) for a in (image, latent))
    encode, decode = jax.jit(network.encode), jax.jit(network.decode)
    return {'encode': lambda: jax.block_until_ready(encode(params, image))[0],
            'decode': lambda: jax.block_until_ready(decode(params, latent))}


def format_row(name: str, taken: dict[str, list[float]]) -> str:
    cells = [name] + [f'{statistics.median(t):.0f} / {min(t):.0f}' for t in taken.values()]
    for pick in (statistics.median, min):
        best = min(pick(t) for other, t in taken.items() if other != 'ours')
        cells.append(f'{pick(taken["ours"]) / best:.2f}')
    return '| ' + ' | '.join(cells) + ' |'


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--image_size', type=int, default=256)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=5, help='turns of each contender')
    add_clock(parser)
    arguments, clock = set_clock(parser)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    torch.set_num_threads(arguments.threads)
    on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
    vae = torch_vae('cuda' if on_gpu else 'cpu', torch.bfloat16 if on_gpu else torch.float32)
    state = {key: value.float().cpu().numpy() for key, value in vae.state_dict().items()}
    rng, side = np.random.default_rng(0), arguments.image_size
    image = rng.uniform(-1, 1, (arguments.batch, 3, side, side)).astype(np.float32)
    latent = rng.normal(size=(arguments.batch, 4, side // 8, side // 8)).astype(np.float32)
    contenders = {'ours': our_calls(state, image, latent, jnp.bfloat16 if on_gpu else jnp.float32),
                  'NCHW': torch_calls(vae, image, latent, channels_last=False),
                  'channels_last': torch_calls(vae, image, latent, channels_last=True)}
    for name in PASSES:
        theirs = contenders['NCHW'][name]().float().cpu().numpy().transpose(0, 2, 3, 1)
        check_same(name, contenders['ours'][name](), theirs, 1e-1 if on_gpu else 1e-4)
    print('\n| pass | ours ms | PyTorch NCHW ms | PyTorch channels_last ms | ours / best PyTorch, medians | '
          'minima |\n|---|---|---|---|---|---|')
    total: dict[str, list[float]] = {}
    for name in PASSES:
        taken = take_turns({c: calls[name] for c, calls in contenders.items()}, arguments.repeats, clock)
        total = {c: [a + b for a, b in zip(total.get(c, [0.0] * len(t)), t, strict=True)]
                 for c, t in taken.items()}
        print(format_row(name, taken), flush=True)
    print(format_row('both', total))


if __name__ == '__main__':
    main()
