"""Options of `analyze.py`. Imports no jax."""
from dataclasses import dataclass

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import given, option

PARTS = ('similarity', 'tokens', 'rank', 'loss', 'alignment', 'routing')
DATA, WHAT, HOW = 'images', 'what is analyzed', 'computation'
LINEARIZE = 'which blocks keep their attention'


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """A model, its images, and the parts of the analysis."""
    source: str = option('model folder or workdir', flag='--from')
    teacher: str | None = option("second model to compare with (default: the teacher of a workdir's recipe); "
                                 "'' for none", default=None)
    out: str = option('output folder', default='analysis')
    parts: str = option(f'any of {",".join(PARTS)}', default='all')

    data: str = option("data set: digits, latents, imagenet2012, folder, tfds:NAME, synthetic (default: the "
                       "workdir's own)", default='', group=DATA)
    data_path: str = option('folder of the data set, if it is not in $LIT_JAX_DATA', default='', group=DATA)
    vae: str = option('VAE folder, for a latent model and a data set of images', default='', group=DATA)
    split: str = option('part of the data set', choices=('train', 'held_out'), default='train', group=DATA)
    images: int = option('number of images, for loss, alignment and routing', default=128, group=DATA)
    map_images: int = option('number of these used for similarity and rank', default=4, group=DATA)
    seed: int = option('random seed of the noise', default=0, group=DATA)

    timesteps: int = option('number of evenly spaced timesteps (of a flow: times), for similarity, rank and '
                            'alignment', default=8, group=WHAT)
    loss_timesteps: int = option('the same for the loss', default=32, group=WHAT)
    image: int = option('index of the image for the token maps', default=0, group=WHAT)
    token: str = option('ROW,COLUMN of the token on its grid, from 0 (default: the middle)', default='',
                        group=WHAT)
    timestep: float | None = option('timestep (of a flow: time) of token maps and routing (default: where a '
                                    'quarter is noise)', default=None, group=WHAT)
    layers: str = option('layers of the token maps, from 0, comma separated (default: four, evenly spaced)',
                         default='', group=WHAT)

    dtype: str = option('compute dtype: float32 or bfloat16', default='float32', group=HOW)
    batch_size: int = option('images per batch, for loss, alignment, routing and --linearize', default=32,
                             group=HOW)
    memory: float = option('GiB for attention maps; larger maps are computed in blocks of queries',
                           default=1.0, group=HOW)

    linearize: bool = option('instead of the parts: put a new mixer into every block of this teacher, align '
                             'them for a short time, and say which blocks keep their attention for a budget',
                             default=False, group=LINEARIZE)
    mixer: str = option('the new mixer, a row of configs/student.py', default='linear', group=LINEARIZE)
    budget: str = option('softmax=SHARE of the blocks, gmacs=NUMBER of an image, or state=BYTES (12MiB)',
                         default='softmax=0.25', group=LINEARIZE)
    align_steps: int = option('steps of alignment', default=200, group=LINEARIZE)
    align_rate: float = option('its learning rate, which falls to 0', default=1e-3, group=LINEARIZE)

    def __post_init__(self):
        if not self.linearize and (words := given(self, LINEARIZE)):
            raise UserError(f'{", ".join(words)}: only with --linearize')

    def chosen(self) -> list[str]:
        """The chosen parts, in the order of PARTS."""
        names = PARTS if self.parts == 'all' else [part.strip() for part in self.parts.split(',')]
        if unknown := [name for name in names if name not in PARTS]:
            raise UserError(f'--parts={self.parts}: unknown {", ".join(map(repr, unknown))}; known: all, '
                            f'{", ".join(PARTS)}')
        return [part for part in PARTS if part in names]
