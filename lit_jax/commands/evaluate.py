"""Scores images: FID, sFID, IS, KID, sKID, precision and recall, each with its recipe.

    python evaluate.py --samples=lit_xl.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --from runs/lit_xl --vae models/sd_vae --reference=VIRTUAL_imagenet256_labeled.npz \\
        --num_samples=50000 --cfg_scale 1 1.25 1.5 --checkpoints=200000,400000 --out=scores/lit_xl
    python evaluate.py reference --data=folder --path=images --image_size=256 --out=images.npz
    python evaluate.py geneval --help

Rows go to OUT/scores.json, a table to OUT/scores.md, FID over guidance, steps and training to OUT/scores.png.
A run that is stopped goes on when its command is given again. On several hosts the same command runs on each
of them (docs/run/clusters.md). Facts and traps: docs/evaluate/evaluation.md.
"""
import argparse
import sys

from lit_jax.runtime import cli


def channels(text: str) -> int | str:
    return text if text == 'all' else int(text)


def names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(',')))


def make_parser(prog: str, description: str):
    return argparse.ArgumentParser(prog=prog, description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common(parser) -> None:
    """What scores and references share."""
    group = parser.add_argument_group('features')
    add = group.add_argument
    add('--features', default='inception', help='inception, or digits[:JUDGE.npz] for images of 8x8 digits; '
                                                'default inception')
    add('--inception', default='', help='its weights; default: $LIT_JAX_INCEPTION, the cache folder, or a '
                                        'download')
    add('--precision', default='highest', help='highest, or bfloat16: faster, and not comparable with '
                                               'published figures')
    group = parser.add_argument_group('devices')
    add = group.add_argument
    add('--coordinator', help='HOST:PORT of process 0, where no scheduler says who the others are')
    add('--num_processes', type=int, help='processes of this run, with --coordinator')
    add('--process_id', type=int, help='number of this process, with --coordinator')


def parse_scores(arguments) -> dict:
    parser = make_parser('evaluate.py', __doc__)
    add = parser.add_argument
    add('--reference', required=True, help='.npz of ADM or of `evaluate.py reference`, or any set of images')
    add('--samples',
        help='images that are there: an .npz (arr_0 uint8 [N, H, W, 3]) or a folder of PNG files')
    add('--from', dest='sources', nargs='+', default=(), metavar='MODEL',
        help='model folders or workdirs to draw from')
    add('--num_samples', type=int, help='images to draw of each; of --samples: the first so many')
    add('--out', default='scores', help='folder of the results; rows of several commands may share one; '
                                        'default scores')
    group = parser.add_argument_group('scores')
    add = group.add_argument
    add('--metrics', type=names, default=None,
        help='comma separated; default fid,sfid,is,kid,skid,precision,recall; more: density,coverage')
    add('--pr_mode', default='float32', help='of precision and recall: float32 (exact), or adm_float16 as '
                                             'ADM rounds')
    add('--is_mode', default='adm', help='adm (chunks of 5000 in file order) or shuffled (10 chunks, as '
                                         'torch-fidelity)')
    group = parser.add_argument_group('drawing, with --from; several values make several rows')
    add = group.add_argument
    add('--checkpoints', default='', help="of workdirs: steps such as 100000,200000, or 'all'; default: the "
                                          "newest")
    add('--steps', type=int, nargs='+', default=(250,), help='evaluations of the model; default 250')
    add('--cfg_scale', type=float, nargs='+', default=(1.0,),
        help='classifier-free guidance; default 1, none')
    add('--cfg_channels', type=channels, choices=(3, 'all'), default=3, help='noise channels that are guided')
    add('--cfg_interval', type=float, nargs=2, default=(0.0, 1.0), metavar=('LOW', 'HIGH'),
        help='part that is guided')
    add('--method', default='ddpm', help='ddpm, ddim, dpm++ or dpm++original')
    add('--eta', type=float, default=0.0, help='noise of ddim')
    add('--vae', help='VAE folder, for models that draw latents')
    add('--labels', choices=('random', 'balanced'), default='random', help='default random, as DiT and LiT')
    add('--classes', default='', help='class indices, comma separated; default all')
    add('--seed', type=int, default=0)
    add('--dtype', default='float32', help='float32 or bfloat16')
    add('--batch_size', type=int, default=0,
        help='images on their way at once on this host; changes no score')
    add('--group', type=int, default=16, help='images that a device draws together')
    add('--keep_samples', action='store_true', help='keep the images, too, as OUT/samples_....npz')
    add_common(parser)
    options = vars(parser.parse_args(arguments))
    if options['metrics'] is None:
        del options['metrics']
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def parse_reference(arguments) -> dict:
    parser = make_parser('evaluate.py reference', 'Makes a reference in ADM\'s layout: statistics of all '
                                                  'images, and some of them.')
    add = parser.add_argument
    add('--data', required=True, help='folder, imagenet2012, tfds:NAME or digits')
    add('--out', required=True, help='NAME.npz')
    add('--path', default='', help='of --data=folder: the folder')
    add('--data_dir', default='', help='folder of all data sets; default $LIT_JAX_DATA')
    add('--split', default='train', help='train or held_out')
    add('--image_size', type=int, help='pixels a side; images are cropped as ADM crops them')
    add('--classes', default='', help='of these classes only: names or numbers, comma separated, a file, or '
                                      'sub_imagenet')
    add('--images', type=int, default=10000, help='images in the file; default 10000')
    add('--seed', type=int, default=0, help='that chooses them')
    add('--threads', type=int, help='that decode images; default one a core')
    add('--strict', action='store_true', help='stop at the first image that cannot be decoded, instead of '
                                              'leaving it out')
    add_common(parser)
    return vars(parser.parse_args(arguments))


def parse_geneval(arguments) -> dict:
    parser = make_parser('evaluate.py geneval', 'GenEval: writes its prompts, or scores images by what a '
                                                'detector saw in them.')
    add = parser.add_argument
    add('--prompts_out', help='writes the 553 prompts into this folder')
    add('--images', help='that folder with images in it: 00000/samples/0000.png and so on')
    add('--detections', help='.jsonl: what was seen in the images, a line each')
    add('--detector', nargs=2, metavar=('CONFIG', 'CHECKPOINT'),
        help='of Mask2Former, instead: looks itself, with PyTorch')
    add('--store', help='with --detector: writes what it sees as FILE.jsonl, and scores nothing')
    add('--out', help='.json of the result; default IMAGES/geneval.json')
    return vars(parser.parse_args(arguments))


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments.pop(0) if arguments and arguments[0] in ('reference', 'geneval') else 'scores'
    options = {'scores': parse_scores, 'reference': parse_reference,
               'geneval': parse_geneval}[kind](arguments)
    # jax comes after the flags: a typing mistake is answered at once.
    if kind == 'geneval':
        from lit_jax.evaluation.geneval_command import Request, run_geneval
        print(run_geneval(Request(**options)))
        return
    from lit_jax.runtime import cluster
    cluster.join(*(options.pop(name) for name in ('coordinator', 'num_processes', 'process_id')))
    cli.name_process(*cluster.process())
    if kind == 'reference':
        from lit_jax.evaluation.build_reference import Request, build_reference
        text = build_reference(Request(**options))
    else:
        from lit_jax.evaluation.evaluation import Request, evaluate
        text = evaluate(Request(**options))
    if cluster.process()[0] == 0:
        print(text)
