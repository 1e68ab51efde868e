"""Options of `prepare_latents.py`. Imports no jax."""
import dataclasses
import shlex
from dataclasses import dataclass

from lit_jax.runtime.options import Processes, option


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Processes):
    """A data set of images, and the networks that encode it."""
    data: str = option("imagenet2012, tfds:NAME, folder, or one's own as package.module:function; with "
                       "captions: captions or shapes")
    vae: str = option('VAE folder, written by convert_torch_ckpt.py')
    image_size: int = option('images are cropped to this side, in pixels')
    out: str = option('output folder; an unfinished one is resumed')
    split: str = option('part of the data set', choices=('train', 'held_out'), default='train')
    data_dir: str = option('folder of all data sets (default: $LIT_JAX_DATA, else ~/.cache/lit_jax/datasets)',
                           default='')
    path: str = option('image folder, for --data=folder and --data=captions', default='')
    num_classes: int | None = option('number of classes, if the data set does not define it', default=None)
    classes: str = option('use only these classes: sub_imagenet, or a text file with one per line',
                          default='')
    dtype: str = option('dtype of the stored moments', choices=('float32', 'float16'), default='float32')
    vae_dtype: str = option('compute dtype of the VAE', choices=('float32', 'bfloat16'), default='float32')
    text_encoder: str = option('text encoder folder, for captions; written by convert_torch_ckpt.py',
                               default='')
    text_dtype: str = option('dtype of the text encoder', choices=('bfloat16', 'float32', 'int8'),
                             default='bfloat16')
    caption_tokens: int = option('captions are truncated to this many tokens', default=300)
    buckets: bool = option('aspect-ratio buckets for captioned images, instead of square crops',
                           default=False)
    patch: int = option('patch size of the model that will be trained: sides of captioned images are '
                        'multiples of it in the latent', default=2)
    batch_size: int = option('images per device and batch, each with its mirror image', default=8)
    shard_size: int | None = option('images per shard (default: 512, more for large data sets)', default=None)
    threads: int | None = option('decoding threads (default: one per core)', default=None)
    strict: bool = option('stop at an image that cannot be decoded (default: skip it)', default=False)

    def command(self) -> str:
        """The command line, without the output folder and the flags of several processes."""
        left_out = {'out', *(field.name for field in dataclasses.fields(Processes))}
        flags = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)
                 if field.name not in left_out and getattr(self, field.name) != field.default]
        return 'python prepare_latents.py ' + ' '.join(
            f'--{name}' if value is True else f'--{name}={shlex.quote(str(value))}' for name, value in flags)
