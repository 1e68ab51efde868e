"""Times one step of a model in JAX and in ONNX Runtime, float32 and with int8 weights, on the CPU.

    python -m benchmarks.runtimes                             # LiT-S/2, guided: a batch of two
    python -m benchmarks.runtimes --width 1152 --depth 28 --heads 16       # the size of LiT-0.6B

Random weights. The runtimes take turns, so that what else the machine does slows all of them; times are also
given over those of jax. Peak memory is that of a process of its own for each runtime, model and all (VmHWM).
It needs the extra `export`.
"""
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import check_same, make_parser, take_turns

KINDS = 'jax', 'onnx', 'onnx int8'


def parse_arguments():
    parser = make_parser(__doc__)
    sizes = {'width': 384, 'depth': 12, 'heads': 6, 'side': 32, 'batch': 2, 'repeats': 9}
    for name, value in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--of', nargs=2, metavar=('KIND', 'FOLDER'), help='one runtime, for its memory')
    return parser.parse_args()


def make_folders(arguments, folder: Path) -> None:
    """The model folder and both exports."""
    import numpy as np

    from lit_jax.checkpoint.model_folder import save_model_folder
    from lit_jax.deploy.export_model import describe, export_model
    from lit_jax.models.network import Network
    from lit_jax.runtime.leaves import named_leaves, unflatten
    network = Network({'family': 'dit', 'depth': arguments.depth, 'width': arguments.width, 'patch': 2,
                       'input_size': (arguments.side,) * 2, 'channels': 4, 'num_classes': 1000,
                       'mixer': {'name': 'linear', 'heads': arguments.heads, 'dwc_kernel': 5}})
    rng = np.random.default_rng(0)
    params = unflatten({path: (0.02 * rng.standard_normal(leaf.shape, np.float32))
                        for path, leaf in named_leaves(network.abstract()).items()})
    config = {'model': network.arch, 'classes': None, 'diffusion': {'steps': 1000, 'kind': 'linear'},
              'latent': {'space': 'vae', 'vae': 'none', 'scale': 0.18215}, 'provenance': {'source': 'random'}}
    save_model_folder(folder / 'jax', config, params)
    for kind in KINDS[1:]:
        print(describe(export_model(folder / 'jax', folder / kind, to='onnx', int8='int8' in kind)))


def open_step(kind: str, folder: Path, batch: int):
    """() -> the output of one step."""
    import numpy as np

    from lit_jax.checkpoint.load import load
    rng, labels = np.random.default_rng(0), np.arange(batch, dtype=np.int32)
    side = load_side(folder)
    x, t = rng.standard_normal((batch, side, side, 4), np.float32), np.full(batch, 500, np.int32)
    if kind == 'jax':
        model = load(folder / kind, scan_layers=False)
        return lambda: np.asarray(model(x, t, labels))
    import onnxruntime
    session = onnxruntime.InferenceSession(str(folder / kind / 'model.onnx'),
                                           providers=['CPUExecutionProvider'])
    return lambda: session.run(None, {'x': x, 't': t, 'label': labels})[0]


def load_side(folder: Path) -> int:
    from lit_jax.checkpoint.model_folder import read_config
    return read_config(folder / 'jax')['model']['input_size'][0]


def peak_bytes() -> int:
    line, = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
    return int(line.split()[1]) * 1024


def main() -> None:
    arguments = parse_arguments()
    if arguments.of:
        kind, folder = arguments.of
        step = open_step(kind, Path(folder), arguments.batch)
        step(), step()
        print(peak_bytes())
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folders(arguments, folder)
        steps = {kind: open_step(kind, folder, arguments.batch) for kind in KINDS}
        check_same('onnx', steps['onnx'](), steps['jax'](), 1e-4)
        times = take_turns(steps, arguments.repeats)
        print(f'batch {arguments.batch}, {arguments.side} x {arguments.side} x 4, depth {arguments.depth}, '
              f'width {arguments.width}')
        print('| runtime | ms a step, median / minimum | over jax | peak memory of its process, GB |\n'
              '|---|---|---|---|')
        for kind in KINDS:
            command = [sys.executable, '-m', 'benchmarks.runtimes', '--of', kind, str(folder), '--batch',
                       str(arguments.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            middle, least = statistics.median(times[kind]), min(times[kind])
            peak = int(done.stdout.split()[-1])
            over = middle / statistics.median(times['jax'])
            print(f'| {kind} | {middle:.0f} / {least:.0f} | {over:.2f} | {peak / 1e9:.2f} |')


if __name__ == '__main__':
    main()
