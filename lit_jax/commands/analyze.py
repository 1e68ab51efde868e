"""Looks inside a model, and beside it inside its teacher: a folder with report.html, figures and
analysis.json.

    python analyze.py --from runs/digits_lit                        # a workdir: its own data, its own teacher
    python analyze.py --from models/digits_dit --data digits
    python analyze.py --from runs/lit_xl --teacher models/dit_xl --parts loss,rank --out analysis/lit_xl

similarity: of the attention maps of the heads, over layers and timesteps (LiT, figure 10). tokens: where one
token looks (DyDi-LiT, figure 6). rank: of the mixer, with and without the depth-wise convolution. loss: by
timestep. routing: what mixers that route choose for each class (DyDi-LiT, figure 5).
"""
import argparse
import sys


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--from', dest='source', required=True, help='model folder or workdir')
    add('--teacher', help="another one to compare with; default: the teacher of a workdir's recipe; '' for "
                          "none")
    add('--out', default='analysis', help='folder that is written; default: analysis')
    add('--parts', default='all', help='any of similarity, tokens, rank, loss, routing, comma separated; '
                                       'default: all')

    which = parser.add_argument_group('which images')
    add = which.add_argument
    add('--data', default='', help="digits, latents, imagenet2012, folder, tfds:NAME, synthetic; default: "
                                   "the workdir's own")
    add('--data_path', default='', help='folder of the data set, where it is not in $LIT_JAX_DATA')
    add('--vae', default='',
        help='VAE folder, where the data set holds images and the model works on latents')
    add('--split', default='train', choices=('train', 'held_out'))
    add('--images', type=int, default=128, help='for the loss and the routing; default: 128')
    add('--map_images', type=int, default=4, help='of these, for similarity and rank (of rank 2); default: 4')
    add('--seed', type=int, default=0, help='of the noise')

    what = parser.add_argument_group('what is looked at')
    add = what.add_argument
    add('--timesteps', type=int, default=8, help='evenly spread, for similarity and rank; default: 8')
    add('--loss_timesteps', type=int, default=32, help='the same for the loss; default: 32')
    add('--image', type=int, default=0, help='number of the image in the maps of a token')
    add('--token', default='', help='its ROW,COLUMN on the token grid, from 0; default: the middle')
    add('--timestep', type=int, help='of the maps of a token and of the routing; default: a quarter of all')
    add('--layers', default='', help='of the maps of a token, from 0; default: four, evenly spread')

    how = parser.add_argument_group('how')
    add = how.add_argument
    add('--dtype', default='float32', help='float32 or bfloat16')
    add('--batch_size', type=int, default=32, help='images at a time, for the loss and the routing')
    add('--memory', type=float, default=1.0, help='GiB for attention maps; larger ones are made of fewer '
                                                  'queries; default: 1')
    return parser.parse_args(arguments)


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.analysis.analysis import Request, analyze
    print(analyze(Request(**options)))
