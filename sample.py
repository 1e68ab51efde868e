"""Draws pictures from a model folder or a workdir. The name of --out says what:

    python sample.py --from runs/digits_lit --classes 3,7 --cfg_scale 4 --steps 50 --out grid.png
    python sample.py --from runs/lit_xl --vae models/sd_vae --classes 207,360 --per_class 4 --out pictures/
    python sample.py --from runs/lit_xl --vae models/sd_vae --count 50000 --cfg_scale 1.5 --steps 250 --out lit_xl.npz
    python sample.py --grid_compare models/dit_xl runs/lit_xl --vae models/sd_vae --out compare.png

.png: a grid, one row a class. .npz: a set for evaluation (arr_0 uint8 [N, H, W, 3], arr_1 labels), its recipe card
beside it. Anything else: a folder of single PNG files. A set that is stopped goes on when its command is given again.
On several hosts the same command runs on each of them (docs/clusters.md).
"""
import argparse
import sys

from lit_jax import cli


def channels(text: str) -> int | str:
    return text if text == 'all' else int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--from', dest='source', help='model folder or workdir')
    add('--grid_compare', dest='compare', nargs=2, metavar=('A', 'B'), help='two of them, side by side on the same noise')
    add('--vae', help='VAE folder, for models that draw latents')
    add('--out', default='grid.png', help='NAME.png, NAME.npz or a folder; default grid.png')

    which = parser.add_argument_group('which pictures')
    add = which.add_argument
    add('--classes', default='', help='class indices, comma separated; default: of a grid the first 10, of a set all')
    add('--per_class', type=int, help='pictures of each class; default of a grid: 8')
    add('--count', type=int, help='pictures of a set, all classes together')
    add('--labels', choices=('random', 'balanced'), help='of a set; default: random with --count, balanced with --per_class')
    add('--seed', type=int, default=0, help='picture i depends on the seed and i, not on batches or devices')

    how = parser.add_argument_group('how they are drawn')
    add = how.add_argument
    add('--method', default='ddpm', help='ddpm, ddim or dpm++ (DPM-Solver++(2M))')
    add('--steps', type=int, default=50, help='evaluations of the model')
    add('--eta', type=float, default=0.0, help='noise of ddim: 0 none, 1 as much as ddpm')
    add('--cfg_scale', type=float, default=4.0, help='classifier-free guidance, 1 = none')
    add('--cfg_channels', type=channels, choices=(3, 'all'), default=3, help='noise channels that are guided')
    add('--cfg_interval', type=float, nargs=2, default=(0.0, 1.0), metavar=('LOW', 'HIGH'),
        help='part of the schedule that is guided, 0 the picture, 1 pure noise')
    add('--dtype', default='float32', help='float32 or bfloat16')

    devices = parser.add_argument_group('devices')
    add = devices.add_argument
    add('--batch_size', type=int, default=0, help='pictures on their way at once on this host; changes no picture')
    add('--group', type=int, default=16, help='pictures that a device computes together; fewer need less memory, another '
                                              'number rounds differently')
    add('--coordinator', help='HOST:PORT of process 0, where no scheduler says who the others are')
    add('--num_processes', type=int, help='processes of this run, with --coordinator')
    add('--process_id', type=int, help='number of this process, with --coordinator')
    return parser.parse_args(arguments)


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    processes = [options.pop(name) for name in ('coordinator', 'num_processes', 'process_id')]
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.sampling.run import Request, draw
    from lit_jax.training import cluster
    cluster.join(*processes)
    cli.name_process(*cluster.process())
    line = draw(Request(**options))
    if cluster.process()[0] == 0:
        print(line)


if __name__ == '__main__':
    cli.run(main)
