"""Encodes a data set of images once, so that training reads latents instead of images.

    python prepare_latents.py --data=imagenet2012 --vae=models/sd_vae --image_size=256 --out=data/latents_256
    python prepare_latents.py --data=folder --path=images --vae=models/sd_vae --out=data/latents
    python prepare_latents.py --data=captions --path=images --vae=models/sdxl_vae --text_encoder=models/t5 \\
        --image_size=512 --buckets --out=data/captions_512

The same command goes on where it was stopped. Sizes on disk for ImageNet at 256 pixels and an SD VAE (32 x 32
x 4, mean and log-variance, image and mirror image): 84 GB in float32, 42 GB in float16; at 512 pixels four
times that. Captions add 8 kB a token in the width of T5-XXL, about 1 MB a long caption, and have no mirror
images. On several hosts the same command runs on each of them (docs/run/clusters.md), and --out is a folder
that all of them share.
"""
import argparse

from lit_jax.runtime import cli


def parse() -> tuple[dict, argparse.Namespace]:
    """(the flags of the data set, those of the processes)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', required=True, help='imagenet2012, tfds:NAME or folder; with captions: captions or shapes')
    add('--vae', required=True, help='VAE folder, written by convert_torch_ckpt.py')
    add('--image_size', type=int, required=True, help='pixels of a side that images are cropped to')
    add('--out', required=True, help='folder of the latents; one that was begun is continued')
    add('--split', default='train', choices=('train', 'held_out'))
    add('--data_dir', default='', help='folder of all data sets (default: $LIT_JAX_DATA, else '
                                       '~/.cache/lit_jax/datasets)')
    add('--path', default='', help='folder of the images, for --data=folder and captions')
    add('--num_classes', type=int, help='classes, where the data set does not say it')
    add('--classes', default='', help='only these: sub_imagenet, or a text file with one class a line')
    add('--dtype', default='float32', choices=('float32', 'float16'), help='of the moments on disk')
    add('--vae_dtype', default='float32', choices=('float32', 'bfloat16'), help='that the VAE computes in')
    add('--text_encoder', default='',
        help='text encoder folder, for captions; written by convert_torch_ckpt.py')
    add('--text_dtype', default='bfloat16', choices=('bfloat16', 'float32', 'int8'),
        help='that the text encoder computes in')
    add('--caption_tokens', type=int, default=300, help='that captions are cut to')
    add('--buckets', action='store_true', help='shapes by the ratio of each captioned image, not squares')
    add('--patch', type=int, default=2, help='of the network that will be trained: sides of captioned images '
                                             'fit it')
    add('--batch_size', type=int, default=8, help='images a device at a time')
    add('--shard_size', type=int, help='images a file (default: 512, more for large data sets)')
    add('--threads', type=int, help='that decode images (default: one a core)')
    add('--strict', action='store_true', help='stop at an image that cannot be decoded, instead of leaving '
                                              'it out')
    several = parser.add_argument_group('several processes, where no scheduler says who the others are')
    several.add_argument('--coordinator', help='HOST:PORT of process 0')
    several.add_argument('--num_processes', type=int)
    several.add_argument('--process_id', type=int)
    args = parser.parse_args()
    return {name: value for name, value in vars(args).items()
            if name not in ('coordinator', 'num_processes', 'process_id')}, args


def main() -> None:
    options, processes = parse()
    # The heavy imports come after the arguments: a typing mistake is answered at once.
    from lit_jax.latents.prepare import Request, prepare_latents
    from lit_jax.runtime import cluster
    cluster.join(processes.coordinator, processes.num_processes, processes.process_id)
    index, count = cluster.process()
    cli.name_process(index, count)
    summary = prepare_latents(Request(**options))
    if index == 0:
        print(summary)
