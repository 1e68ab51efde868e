"""Feature spaces of the scores: ADM's Inception, a judge of digits, a VAE, or any function."""
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.convert.inception_weights import load_inception
from lit_jax.data.sources import default_data_dir
from lit_jax.data.toys.digits import open_digits
from lit_jax.metrics.features import FeatureExtractor, Features
from lit_jax.metrics.toys import digits_judge
from lit_jax.models.inception import SPATIAL_WIDTH, WIDTH
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError, did_you_mean
from lit_jax.runtime.leaves import params_sha256
from lit_jax.runtime.paths import as_path, cache_folder

LOG = logging.getLogger('lit_jax')
INCEPTION, DIGITS, MNIST = 'FID-Inception 2015-12-05 (ADM)', 'digits judge', 'MNIST judge'
KNOWN = ('inception', 'digits[:JUDGE.npz]', 'mnist', 'vae:FOLDER')
CELLS = 4      # of a VAE's latents, each way


@dataclass(frozen=True)
class FeatureSpace:
    """A feature extractor and its description.

    Attributes:
        facts: JSON-able, part of every recipe card: 'flavour', 'sha256' of the weights, 'precision' and more.
        extract: uint8 [n, H, W, 3] -> Features. Their bits do not depend on the devices, nor on n if all
            calls but the last get whole groups.
        widths: of the pool features and of the spatial features (0: none).
        group: images computed together.
        head: [pool width, classes], for the inception score.
        image_shape: (H, W) of its inputs; None: any.
        adm: means are taken in float32, as in ADM's evaluator.
    """
    facts: dict
    extract: Callable[[np.ndarray], Features]
    widths: tuple[int, int]
    group: int
    head: np.ndarray | None = None
    image_shape: tuple[int, int] | None = None
    adm: bool = False


def open_space(name: str = 'inception', *, inception: str = '', precision: str = 'highest') -> FeatureSpace:
    """The feature space of a name; collective. UserError if its weights cannot be found.

    inception: path of the weights, '' to look for them. precision: of Inception."""
    kind, _, path = name.partition(':')
    if kind == 'inception' and not path:
        return peers.together(lambda: inception_space(inception, precision))
    if kind not in ('digits', 'vae') and name != 'mnist' or kind == 'vae' and not path:
        raise UserError(f'unknown --features={name}{did_you_mean(name, KNOWN)}; known: {", ".join(KNOWN)}')
    if inception or precision != 'highest':
        raise UserError(f'--inception and --precision go with --features=inception, not {name}')
    if kind == 'vae':
        return vae_space(path)
    if name == 'mnist':
        return peers.together(lambda: digits_space(digits_judge.open_mnist_judge(), MNIST))
    path = as_path(path or cache_folder() / 'digits_judge.npz')
    peers.only_lead(lambda: _make_judge(path))
    return peers.together(lambda: digits_space(digits_judge.load_judge(path)))


def inception_space(path: str = '', precision: str = 'highest') -> FeatureSpace:
    """Pool and spatial features of FID-Inception, resized and scaled as ADM's graph does."""
    found = load_inception(path, precision)
    extractor = FeatureExtractor(found)
    if not found.published:
        LOG.warning('the Inception weights in %s are not the published ones: scores are not comparable',
                    found.source)
    facts = {'flavour': INCEPTION, **found.describe(), 'group': extractor.group}
    return FeatureSpace(facts, extractor.extract, (WIDTH, SPATIAL_WIDTH), extractor.group,
                        head=np.asarray(found.params['fc']['kernel']), adm=True)


def digits_space(judge: digits_judge.Judge, flavour: str = DIGITS) -> FeatureSpace:
    """The 48 features of a digits classifier, for images of its size; it uses the first channel."""
    def look(params, images_BHWC):
        grey = images_BHWC[..., :1].astype(jnp.float32) / 127.5 - 1
        with jax.default_matmul_precision('highest'):
            return {'pool': params['scale'] * digits_judge.network(params['network'], grey)[0]}

    params = {'network': judge.params, 'scale': np.float32(judge.feature_scale)}
    return function_space(flavour, look, params, digits_judge.FEATURES, image_shape=judge.image[:2],
                          head=judge.params['head'] / judge.feature_scale)


def vae_space(path: str) -> FeatureSpace:
    """What a VAE of one's own sees: the means of its latents in 4 x 4 parts of the image, and the standard
    deviation of each channel, so that blurred images are told from sharp ones. Needs no download; distances
    compare with others in the same VAE's features only. UserError if the folder cannot be read."""
    vae = load_vae(path)
    channels = vae.network.channels

    def look(params, images_BHWC):
        with jax.default_matmul_precision('highest'):
            x_BHWC = images_BHWC[..., :vae.network.arch['image_channels']].astype(jnp.float32) / 127.5 - 1
            mean_BHWC, _ = vae.network.encode(params, x_BHWC)
            rows, columns = (_cells(side) for side in mean_BHWC.shape[1:3])
            parts = jnp.einsum('bhwc,hi,wj->bijc', mean_BHWC, rows, columns)
        return {'pool': jnp.concatenate([parts.reshape(len(parts), -1), mean_BHWC.std(axis=(1, 2))], axis=-1)}

    return function_space(f'VAE {vae.id}', look, vae.params, (CELLS**2 + 1) * channels)


def _cells(side: int) -> np.ndarray:
    """[side, CELLS]: weights that take means over parts of an axis."""
    belongs = np.arange(side)[:, None] * CELLS // side == np.arange(CELLS)
    return (belongs / np.maximum(belongs.sum(axis=0), 1)).astype(np.float32)


def function_space(flavour: str, fn: Callable, params, width: int, *, spatial_width: int = 0,
                   precision: str = 'highest', head: np.ndarray | None = None,
                   image_shape: tuple[int, int] | None = None) -> FeatureSpace:
    """The features of any fn(params, uint8 [B, H, W, 3]) -> {'pool': [B, width], optional 'spatial': ...}.

    flavour, precision: for the recipe card; functions with the same flavour must be the same function."""
    extractor = FeatureExtractor(fn=fn, params=params)
    facts = {'flavour': flavour, 'sha256': params_sha256(params), 'precision': precision,
             'group': extractor.group}
    return FeatureSpace(facts, extractor.extract, (width, spatial_width), extractor.group, head=head,
                        image_shape=image_shape)


def _make_judge(path) -> None:
    if path.exists():
        return
    LOG.info('training the digits classifier, once: %s', path)
    train = open_digits('train', as_path(default_data_dir()))
    path.parent.mkdir(parents=True, exist_ok=True)
    digits_judge.train_judge(train.images, train.labels).save(path)
