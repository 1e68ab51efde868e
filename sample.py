"""Draws pictures from a model folder or a workdir.

    python sample.py --from runs/digits_lit --classes 3,7 --cfg_scale 4 --steps 50 --out grid.png
"""
import argparse

from lit_jax import cli


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--from', dest='source', required=True, help='model folder or workdir')
    parser.add_argument('--out', default='grid.png', help='PNG to write')
    parser.add_argument('--classes', default='', help='class indices, comma separated; default: all, at most 10')
    parser.add_argument('--per_class', type=int, default=8, help='pictures a class')
    parser.add_argument('--cfg_scale', type=float, default=4.0, help='classifier-free guidance, 1 = none')
    parser.add_argument('--cfg_channels', choices=('3', 'all'), default='3', help='noise channels that are guided')
    parser.add_argument('--steps', type=int, default=50, help='sampling steps')
    parser.add_argument('--method', default='ddpm', help='ddpm or ddim')
    parser.add_argument('--eta', type=float, default=0.0, help='noise of ddim: 0 none, 1 as much as ddpm')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
    return parser.parse_args()


def main() -> None:
    args = parse()
    from lit_jax.sampling import draw_grid
    print(draw_grid(args.source, args.out, classes=args.classes, per_class=args.per_class, cfg_scale=args.cfg_scale,
                    cfg_channels=args.cfg_channels, steps=args.steps, method=args.method, eta=args.eta,
                    seed=args.seed, dtype=args.dtype))


if __name__ == '__main__':
    cli.run(main)
