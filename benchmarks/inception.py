"""Times features of FID-Inception: ours, jitted, against torch-fidelity's network.

    PYTHONPATH=tests python benchmarks/inception.py      # 16 images of 256 pixels, 2 minutes
    PYTHONPATH=tests python benchmarks/inception.py --threads 1 --clock cpu      # on a busy machine

Both have the same random weights and the same uint8 images, resize them themselves, and run in one process on
the same cores, in turn, so that whatever else the machine does hits them alike; medians and minima are given,
and our time over that of the faster PyTorch. PyTorch runs eagerly in both memory layouts, NCHW
(torch-fidelity's own) and channels_last. It is first checked that all compute the same. float32 on a CPU; on
a GPU TF32 is off in both.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

PEERS = {'NCHW': 'contiguous_format', 'channels_last': 'channels_last'}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_size', type=int, default=256)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--threads', type=int, default=2, help='cores that both frameworks may use')
    parser.add_argument('--repeats', type=int, default=5, help='turns of each contender')
    parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall',
                        help='cpu: processor time, which a busy machine disturbs less; needs --threads 1')
    arguments = parser.parse_args()
    if arguments.clock == 'cpu' and arguments.threads != 1:
        parser.error(
            '--clock cpu adds up the time of all threads, waiting ones too; give --threads 1 with it')
    return arguments


def torch_call(state, images, layout: str, device: str):
    """() -> (pool, logits) of torch-fidelity's network, which wants its weights from a file."""
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


def take_turns(calls: dict, repeats: int, clock) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn; a turn starts with an untimed call: caches and threads are
    then its own."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = clock()
            call()
            taken[name].append(1e3 * (clock() - start))
    return taken


def check(ours, theirs) -> None:
    import numpy as np
    for name, a, b in zip(('pool', 'logits'), ours, theirs, strict=True):
        a, b = np.asarray(a), b.cpu().numpy()
        error = np.abs(a - b).max() / np.abs(b).max()
        print(f'{name}: largest difference {error:.1e} of the largest value')
        if not error <= 1e-4:
            raise SystemExit('the two compute different things; their times mean nothing')


def main() -> None:
    arguments = parse_arguments()
    from block import limit_threads
    limit_threads(arguments.threads)
    import jax
    import torch
    from inception_samples import torch_state, weights
    torch.set_num_threads(arguments.threads)
    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    state, side = torch_state(), arguments.image_size
    images = weights.images(0, 'benchmark', arguments.batch, side, side)
    calls = {'ours': our_call(state, images),
             **{name: torch_call(state, images, layout, device) for name, layout in PEERS.items()}}
    check(calls['ours'](), calls['NCHW']())
    clock = time.process_time if arguments.clock == 'cpu' else time.perf_counter
    taken = {name: [t / arguments.batch for t in times]
             for name, times in take_turns(calls, arguments.repeats, clock).items()}
    print('\nmilliseconds an image, median / minimum\n')
    print('| ours | torch-fidelity NCHW | channels_last | ours / its own | ours / best PyTorch, medians | '
          'minima |\n|---|---|---|---|---|---|')
    cells = [f'{statistics.median(t):.1f} / {min(t):.1f}' for t in taken.values()]
    cells.append(f'{statistics.median(taken["ours"]) / statistics.median(taken["NCHW"]):.2f}')
    for pick in (statistics.median, min):
        cells.append(f'{pick(taken["ours"]) / min(pick(taken[name]) for name in PEERS):.2f}')
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
