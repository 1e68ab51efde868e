"""Times the features of FID-Inception: ours, jitted, against torch-fidelity's network.

    PYTHONPATH=tests python -m benchmarks.inception                           # 16 images of 256 px, 2 minutes
    PYTHONPATH=tests python -m benchmarks.inception --threads 1 --clock cpu   # on a busy machine

All have the same random weights and uint8 images, resize them themselves, and take turns on the same cores;
results are compared first. The table has medians and minima, and our time over that of the faster PyTorch,
which runs eagerly in both memory layouts, NCHW (torch-fidelity's) and channels_last. float32 on a CPU; on a
GPU TF32 is off in both.
"""
import statistics
import tempfile
from pathlib import Path

from benchmarks.timing import add_clock, check_same, make_parser, set_clock, take_turns

PEERS = {'NCHW': 'contiguous_format', 'channels_last': 'channels_last'}


def torch_call(state, images, layout: str, device: str):
    """() -> (pool, logits) of torch-fidelity's network, which reads its weights from a file."""
    import torch
    from torchvision_shim import import_oracle
    oracle = import_oracle('torch_fidelity.feature_extractor_inceptionv3')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'weights.pth'
        torch.save({key: torch.from_numpy(value) for key, value in state.items()}, path)
        network = oracle.FeatureExtractorInceptionV3('peer', ['2048', 'logits_unbiased'],
                                                     feature_extractor_weights_path=str(path))
    memory_format = getattr(torch, layout)
    network = network.to(device).to(memory_format=memory_format)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device).contiguous(memory_format=memory_format)

    def run():
        with torch.no_grad():
            found = network(x)
        if device == 'cuda':
            torch.cuda.synchronize()
        return found

    return run


def our_call(state, images):
    import jax

    from lit_jax.convert.inception_weights import read_inception_params
    from lit_jax.models.inception import InceptionNetwork
    network = InceptionNetwork()
    params = jax.device_put(read_inception_params(state, 'the random weights', network))
    images = jax.device_put(images)
    features = jax.jit(network.features, compiler_options=network.inference_options())

    def run():
        found = jax.block_until_ready(features(params, images))
        return found['pool'], found['logits']

    return run


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--image_size', type=int, default=256)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5, help='turns of each contender')
    add_clock(parser)
    arguments, clock = set_clock(parser)
    import jax
    import torch
    from inception_samples import torch_state, weights
    torch.set_num_threads(arguments.threads)
    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    state, side = torch_state(), arguments.image_size
    images = weights.images(0, 'benchmark', arguments.batch, side, side)
    calls = {'ours': our_call(state, images),
             **{name: torch_call(state, images, layout, device) for name, layout in PEERS.items()}}
    for name, ours, theirs in zip(('pool', 'logits'), calls['ours'](), calls['NCHW'](), strict=True):
        check_same(name, ours, theirs.cpu().numpy(), 1e-4)
    taken = {name: [t / arguments.batch for t in times]
             for name, times in take_turns(calls, arguments.repeats, clock).items()}
    print('\nmilliseconds per image, median / minimum\n')
    print('| ours | torch-fidelity NCHW | channels_last | ours / its own | ours / best PyTorch, medians | '
          'minima |\n|---|---|---|---|---|---|')
    cells = [f'{statistics.median(t):.1f} / {min(t):.1f}' for t in taken.values()]
    cells.append(f'{statistics.median(taken["ours"]) / statistics.median(taken["NCHW"]):.2f}')
    for pick in (statistics.median, min):
        cells.append(f'{pick(taken["ours"]) / min(pick(taken[name]) for name in PEERS):.2f}')
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
