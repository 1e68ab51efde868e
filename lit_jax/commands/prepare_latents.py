"""Encodes an image data set once, so that training reads latents instead of images; or a teacher draws it.

    python prepare_latents.py --data=imagenet2012 --vae=models/sd_vae --image_size=256 --out=data/latents_256
    python prepare_latents.py --data=folder --path=images --vae=models/sd_vae --image_size=256 \\
        --out=data/latents
    python prepare_latents.py --data=captions --path=images --vae=models/sdxl_vae --text_encoder=models/t5 \\
        --image_size=512 --buckets --out=data/captions_512
    python prepare_latents.py --data=lightningdit --path=vavae_latents --vae=models/va_vae \\
        --out=data/va_vae_256
    python prepare_latents.py --teacher=models/dit_xl --count=50000 --cfg_scale=1.5 --out=data/drawn

The same command resumes an interrupted run. Sizes on disk for ImageNet at 256 pixels and an SD VAE (32 x 32
x 4, mean and log-variance, image and mirror image): 84 GB in float32, 42 GB in float16; at 512 pixels four
times that. Captions add 8 kB a token in the width of T5-XXL, about 1 MB a long caption, and have no mirror
images. On several hosts the same command runs on each of them (docs/run/clusters.md), and --out is a folder
that all of them share.
"""
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime import cli
from lit_jax.runtime.options import parse_options


def main() -> None:
    options = parse_options(PrepareOptions, description=__doc__)
    reports = cli.join(options)
    from lit_jax.latents.prepare import prepare_latents
    summary = prepare_latents(options)
    if reports:
        print(summary)
