"""Options of `prepare_latents.py`. Imports no jax."""
import dataclasses
import shlex
from dataclasses import dataclass

from lit_jax.runtime.options import Processes, option
from lit_jax.sampling.request import SamplerFlags

IMAGES = 'images, encoded by a VAE'
DRAWN = 'or images that a teacher draws (with settings of the sampler)'


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(SamplerFlags, Processes):
    """A data set of images, and the networks that encode it; or the teacher that draws one."""
    out: str = option('output folder; an unfinished one is resumed')
    split: str = option('part of the data set', choices=('train', 'held_out'), default='train')
    classes: str = option('use only these classes: sub_imagenet, or a text file with one per line; of a '
                          'teacher: their names or numbers, comma separated', default='')
    dtype: str = option('dtype of the stored latents', choices=('float32', 'float16'), default='float32')
    text_encoder: str = option('text encoder folder, for captions; written by convert_torch_ckpt.py',
                               default='')
    text_dtype: str = option('dtype of the text encoder', choices=('bfloat16', 'float32', 'int8'),
                             default='bfloat16')
    shard_size: int | None = option('images per shard (default: 512, more for large data sets)', default=None)

    data: str = option("imagenet2012, tfds:NAME, folder, or one's own as package.module:function; with "
                       "captions: captions or shapes; lightningdit: latents that its own code cached",
                       default='', group=IMAGES)
    vae: str = option('VAE folder, written by convert_torch_ckpt.py', default='', group=IMAGES)
    image_size: int | None = option('images are cropped to this side, in pixels', default=None, group=IMAGES)
    data_dir: str = option('folder of all data sets (default: $LIT_JAX_DATA, else ~/.cache/lit_jax/datasets)',
                           default='', group=IMAGES)
    path: str = option('folder of the images, for --data=folder and --data=captions, or of the latents',
                       default='', group=IMAGES)
    num_classes: int | None = option('number of classes, if the data set does not define it', default=None,
                                     group=IMAGES)
    vae_dtype: str = option('compute dtype of the VAE', choices=('float32', 'bfloat16'), default='float32',
                            group=IMAGES)
    caption_tokens: int = option('captions are truncated to this many tokens', default=300, group=IMAGES)
    buckets: bool = option('aspect-ratio buckets for captioned images, instead of square crops',
                           default=False, group=IMAGES)
    patch: int = option('patch size of the model that will be trained: sides of captioned images are '
                        'multiples of it in the latent', default=2, group=IMAGES)
    batch_size: int = option('images per device and batch, each with its mirror image', default=8,
                             group=IMAGES)
    threads: int | None = option('decoding threads (default: one per core)', default=None, group=IMAGES)
    strict: bool = option('stop at an image that cannot be decoded (default: skip it)', default=False,
                          group=IMAGES)

    teacher: str = option('model folder or workdir that draws the data set', default='', group=DRAWN)
    count: int | None = option('images to draw; classes and prompts take turns', default=None, group=DRAWN)
    prompts: str = option('text file with one prompt per line, for a text-to-image teacher', default='',
                          metavar='FILE', group=DRAWN)
    seed: int | None = option('random seed; image i depends on the seed and i, not on devices; default: 0',
                              default=None, group=DRAWN)
    teacher_dtype: str | None = option('compute dtype of the teacher: float32 or bfloat16; default: float32',
                                       default=None, group=DRAWN)
    group: int | None = option('images that a device computes together; fewer take less memory, another '
                               'number rounds differently; default: 16, of prompts 1 to 8 by their size',
                               default=None, group=DRAWN)

    def command(self) -> str:
        """The command line, without the output folder and the flags of several processes."""
        left_out = {'out', *(field.name for field in dataclasses.fields(Processes))}
        flags = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)
                 if field.name not in left_out and getattr(self, field.name) != field.default]
        return 'python prepare_latents.py ' + ' '.join(_written(name, value) for name, value in flags)


def _written(name: str, value) -> str:
    if value is True:
        return f'--{name}'
    if isinstance(value, tuple):
        return ' '.join((f'--{name}', *map(str, value)))
    return f'--{name}={shlex.quote(str(value))}'
