"""Draws images from a model folder or a workdir: of classes, or of what prompts say. The name of --out says
what:

    python sample.py --from runs/digits_lit --classes 3,7 --cfg_scale 4 --steps 50 --out grid.png
    python sample.py --from runs/lit_xl --vae models/sd_vae --classes 207,360 --per_class 4 --out images/
    python sample.py --from runs/lit_xl --vae models/sd_vae --count 50000 --cfg_scale 1.5 --out lit_xl.npz
    python sample.py --grid_compare models/dit_xl runs/lit_xl --vae models/sd_vae --out compare.png
    python sample.py --from=runs/lit_t2i --text_encoder=models/t5 --vae=models/sdxl_vae \\
        --prompt="a red fox in the snow" --seeds=0,1,2 --size=1024x1024 --low_memory --out=fox.png

.png: a grid, one row a class or a prompt. .npz: a set for evaluation (arr_0 uint8 [N, H, W, 3], arr_1
labels), its recipe card beside it. Anything else: a folder of single PNG files. A set or folder that is
stopped goes on when its command is given again. On several hosts the same command runs on each of them
(docs/run/clusters.md).
"""
import argparse
import sys

from lit_jax.runtime import cli


def channels(text: str) -> int | str:
    return text if text == 'all' else int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--from', dest='source', help='model folder or workdir')
    add('--grid_compare', dest='compare', nargs=2, metavar=('A', 'B'),
        help='two of them, side by side on the same noise')
    add('--vae', help='VAE folder, for models that draw latents')
    add('--out', help='NAME.png, NAME.npz or a folder; default grid.png')

    which = parser.add_argument_group('which images, of models for classes')
    add = which.add_argument
    add('--classes', help='class indices, comma separated; default: of a grid the first 10, of a set all')
    add('--per_class', type=int, help='images of each class; default of a grid: 8')
    add('--count', type=int, help='images of a set, all classes together')
    add('--labels', choices=('random', 'balanced'), help='of a set; default: random with --count, balanced '
                                                         'with --per_class')
    add('--seed', type=int, help='default 0. Image i depends on the seed and i, of a prompt on the seed: not '
                                 'on batches or devices')

    text = parser.add_argument_group('which images, of models for prompts')
    add = text.add_argument
    add('--prompt', action='append', help='what to draw; may be given several times')
    add('--prompts', help='a text file of prompts, one a line')
    add('--negative_prompt', help='what the guidance leads away from; default: the empty prompt')
    add('--seeds', help='0,1,2: each prompt is drawn once for each; instead of --seed')
    add('--size', help='WIDTHxHEIGHT in pixels, or one number; default: what the model is meant for')
    add('--geneval', help='draws the prompts of this folder (evaluate.py geneval --prompts_out) into it, 4 '
                          'seeds of each')
    add('--text_encoder', help='text encoder folder')
    add('--text_dtype', help='float32, bfloat16, or int8: a quarter of the memory; default float32 on CPU, '
                             'bfloat16 elsewhere')
    add('--low_memory', action='store_true', default=None,
        help='one network in memory at a time: text encoder, backbone, VAE')
    add('--tile', type=int, help='side of the squares that the VAE decodes one by one, in latent pixels; '
                                 'default 64 with --low_memory and above 1024 pixels, else the whole image')

    how = parser.add_argument_group('how they are drawn')
    add = how.add_argument
    add('--method', help='ddpm, ddim, or DPM-Solver++(2M): dpm++ as diffusers has it, dpm++original as '
                         'PixArt; default: of classes ddpm, of prompts dpm++')
    add('--steps', type=int, help='evaluations of the model; default: of classes 50, of prompts 20')
    add('--eta', type=float, help='noise of ddim: 0 none (the default), 1 as much as ddpm')
    add('--cfg_scale', type=float, help='classifier-free guidance, 1 = none; default: of classes 4, of '
                                        'prompts 4.5')
    add('--cfg_channels', type=channels, choices=(3, 'all'), help='noise channels that are guided; '
        'default: of classes 3, of prompts all')
    add('--cfg_interval', type=float, nargs=2, metavar=('LOW', 'HIGH'),
        help='part of the schedule that is guided, 0 the image, 1 pure noise; default 0 1')
    add('--dtype', help='float32 (the default) or bfloat16')

    devices = parser.add_argument_group('devices')
    add = devices.add_argument
    add('--batch_size', type=int,
        help='images of classes on their way at once on this host; changes no image')
    add('--group', type=int, help='images that a device computes together; fewer need less memory, another '
                                  'number rounds differently; default: of classes 16, of prompts 1 to 8 by '
                                  'their size')
    add('--coordinator', help='HOST:PORT of process 0, where no scheduler says who the others are')
    add('--num_processes', type=int, help='processes of this run, with --coordinator')
    add('--process_id', type=int, help='number of this process, with --coordinator')
    return parser.parse_args(arguments)


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    processes = [options.pop(name) for name in ('coordinator', 'num_processes', 'process_id')]
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.runtime import cluster
    from lit_jax.sampling.draw_classes import start
    cluster.join(*processes)
    cli.name_process(*cluster.process())
    line = start({name: value for name, value in options.items() if value is not None})
    if cluster.process()[0] == 0:
        print(line)
