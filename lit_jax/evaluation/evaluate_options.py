"""Options of `evaluate.py` and of its verbs `reference` and `geneval`. Imports no jax."""
from dataclasses import dataclass

from lit_jax.diffusion.settings import FLOW_METHOD, FLOW_METHODS, PRESETS, SCORES
from lit_jax.runtime.options import Processes, option

METRICS = ('fid', 'sfid', 'is', 'kid', 'skid', 'precision', 'recall', 'density', 'coverage')
DRAWING = 'sampling, with --from (several values make several rows)'


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Processes):
    """Options in which scores and references must agree."""
    features: str = option("inception, digits[:JUDGE.npz] for 8x8 digits, mnist for 28x28, or vae:FOLDER, "
                           "the latents of a VAE of one's own", default='inception', group='features')
    inception: str = option('file of the Inception weights (default: $LIT_JAX_INCEPTION, the cache folder, '
                            'or a download)', default='', group='features')
    precision: str = option('highest, or bfloat16: faster, but not comparable with published scores',
                            default='highest', group='features')


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(FeatureOptions):
    """Scores of one image set (`samples`), or of models under several settings (`sources`)."""
    reference: str = option('.npz from ADM or from `evaluate.py reference`, or any image set')
    samples: str | None = option('existing images: an .npz (arr_0 uint8 [N, H, W, 3]) or a folder of PNG '
                                 'files', default=None)
    sources: tuple[str, ...] = option('model folders or workdirs to sample from', flag='--from', nargs='+',
                                      metavar='MODEL', default=())
    num_samples: int | None = option('images to draw from each model; with --samples: use only the first N',
                                     default=None)
    out: str = option('output folder; several commands may add rows to the same one', default='scores')

    metrics: tuple[str, ...] = option(f'any of {",".join(METRICS)}', default=METRICS[:7], metavar='NAMES',
                                      group='scores')
    pr_mode: str = option('distances of precision and recall: float32 (exact), or adm_float16, rounded as in '
                          "ADM's evaluator", default='float32', group='scores')
    is_mode: str = option('splits of the inception score: adm (chunks of 5000 in file order) or shuffled (10 '
                          'chunks, as torch-fidelity)', default='adm', group='scores')

    checkpoints: str = option("steps of a workdir's checkpoints such as 100000,200000, or all (default: the "
                              'newest)', default='', group=DRAWING)
    preset: str | None = option('how published figures of flows were drawn; other flags of the sampler win',
                                choices=tuple(PRESETS), default=None, group=DRAWING)
    steps: tuple[int, ...] = option(f'sampling steps; default: of the preset, else {SCORES.steps}', nargs='+',
                                    default=(), group=DRAWING)
    cfg_scale: tuple[float, ...] = option('classifier-free guidance scale; default: of the preset, else 1: '
                                          'none', nargs='+', default=(), group=DRAWING)
    cfg_channels: int | str | None = option('noise channels that are guided; default: of the preset, else 3',
                                            choices=(3, 'all'), default=None, group=DRAWING)
    cfg_interval: tuple[float, float] | None = option(
        'guided part of the schedule, from 0 (image) to 1 (noise); default: of the preset, else all',
        nargs=2, metavar=('LOW', 'HIGH'), default=None, group=DRAWING)
    method: str | None = option(f'sampler: ddpm, ddim, dpm++ or dpm++original (default: ddpm); of flows '
                                f'{", ".join(FLOW_METHODS)} (default: {FLOW_METHOD})', default=None,
                                group=DRAWING)
    eta: float | None = option('noise of ddim: 0 (default) is deterministic, 1 as much as ddpm', default=None,
                               group=DRAWING)
    shift: float | None = option('of the times of a flow, above 1 to the noise (default: 1)', default=None,
                                 group=DRAWING)
    sde_form: str | None = option('diffusion of sde: sigma (SiT, default), linear (REPA), ...', default=None,
                                  group=DRAWING)
    sde_norm: float | None = option('factor of that diffusion (default: 1)', default=None, group=DRAWING)
    last_step: str | None = option('of sde: mean (default), euler, tweedie or none', default=None,
                                   group=DRAWING)
    last_size: float | None = option('time that it takes (default: 0.04)', default=None, group=DRAWING)
    tolerance: float | None = option('relative error of a step of dopri5 (default: 0.001)', default=None,
                                     group=DRAWING)
    vae: str | None = option('VAE folder, for latent models', default=None, group=DRAWING)
    labels: str = option('class labels: drawn at random (as DiT and LiT), or balanced',
                         choices=('random', 'balanced'), default='random', group=DRAWING)
    classes: str = option('names or numbers of classes, comma separated (default: all)', default='',
                          group=DRAWING)
    seed: int = option('random seed', default=0, group=DRAWING)
    dtype: str = option('compute dtype: float32 or bfloat16', default='float32', group=DRAWING)
    keep_samples: bool = option('also keep the images, as OUT/samples_....npz', default=False, group=DRAWING)

    batch_size: int = option('max images in flight per host; does not affect the scores; 0: chosen from the '
                             'devices', default=0, group='devices')
    group: int = option('images that a device samples together', default=16, group='devices')


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(FeatureOptions):
    """Statistics of a data set in ADM's layout, with some of its images."""
    data: str = option("folder, imagenet2012, tfds:NAME, digits, mnist, or one's own as "
                       "package.module:function")
    out: str = option('NAME.npz')
    path: str = option('image folder, for --data=folder', default='')
    data_dir: str = option('folder of all data sets (default: $LIT_JAX_DATA)', default='')
    split: str = option('train or held_out', default='train')
    image_size: int | None = option('side in pixels; images are cropped as in ADM', default=None)
    classes: str = option('use only these classes: names or numbers, comma separated, a file, or '
                          'sub_imagenet', default='')
    images: int = option('number of images stored in the file', default=10000)
    seed: int = option('random seed that selects them', default=0)
    threads: int | None = option('decoding threads (default: one per core)', default=None)
    strict: bool = option('stop at the first image that cannot be decoded (default: skip it)', default=False)


@dataclass(frozen=True, kw_only=True)
class GenevalOptions:
    """Writes the prompts of GenEval, or scores images by the objects that a detector finds in them."""
    prompts_out: str | None = option('folder to write the 553 prompts to', default=None)
    images: str | None = option('that folder with images in it: 00000/samples/0000.png ...', default=None)
    detections: str | None = option('.jsonl with the detected objects, one line per image', default=None)
    detector: tuple[str, str] | None = option('of Mask2Former, to run the detector now (needs PyTorch)',
                                              nargs=2, metavar=('CONFIG', 'CHECKPOINT'), default=None)
    store: str | None = option('with --detector: store the detections as this .jsonl, and score nothing',
                               default=None)
    out: str | None = option('.json of the result (default: IMAGES/geneval.json)', default=None)
