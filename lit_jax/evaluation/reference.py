"""References that samples are compared with: a file in ADM's layout, or any other set of images.

    mu [2048], sigma [2048, 2048]       of the pool features of the whole data set
    mu_s [2023], sigma_s [2023, 2023]   of the spatial features
    arr_0 uint8 [10000, H, W, 3]        some of its images, for precision, recall and kernel distances
    meta                                JSON text; only in files that `evaluate.py reference` wrote

A file with statistics but no images is enough for FID and sFID. A set of images is enough for all scores: its
statistics are computed from the images.
"""
from dataclasses import dataclass, field

import numpy as np

from lit_jax.evaluation.sets import IMAGES, FolderSet, NpzSet, open_set
from lit_jax.evaluation.spaces import FeatureSpace
from lit_jax.metrics.frechet import Statistics
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.npz_reader import Npz, shown_names
from lit_jax.runtime.paths import as_path, explain_unreachable, file_sha256

STORED = {'pool': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}
FORMAT = 1
_META = {'count?': int, 'image_size?': int, 'features?': {}, 'arrays?': [str], 'data?': {}}


@dataclass
class Reference:
    """A reference whose images are not read yet.

    Attributes:
        statistics: of the 'pool' and 'spatial' features of the whole data set, if stored.
        meta: the settings that made the file; {} if it does not contain them.
    """
    path: object
    statistics: dict[str, Statistics]
    images: NpzSet | FolderSet | None
    meta: dict = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the file, or of the names and contents of a folder."""
        return file_sha256(self.path) if self.images is None else self.images.sha256

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """(H, W) of its images, if known."""
        if self.images is not None:
            return tuple(self.images.shape)
        return (self.meta['image_size'],) * 2 if 'image_size' in self.meta else None

    def facts(self) -> dict:
        """JSON-able, for the recipe card."""
        of, count = 'of its own images', self.meta.get('count')
        if self.statistics:
            of = 'stored in it' + (f', of {count} images' if count else '')
        return {'id': self.path.name, 'sha256': self.sha256, 'statistics': of,
                'pictures': 0 if self.images is None else self.images.count, 'meta': self.meta or None}


def open_reference(path, space: FeatureSpace) -> Reference:
    """The reference at `path`. UserError if it is damaged, or made with features other than `space`."""
    path = as_path(path)
    with explain_unreachable(path):
        if not path.exists():
            raise UserError(f'the reference {path} does not exist. ADM publishes '
                            f'VIRTUAL_imagenet256_labeled.npz and others (see docs/evaluate/evaluation.md); '
                            f'for other data make one: python evaluate.py reference --data=... --out=ref.npz')
        is_npz = path.is_file() and path.suffix == '.npz'
    reference = _read_npz(path) if is_npz else Reference(path, {}, open_set(path))
    _check_space(reference, space)
    return reference


def _read_npz(path) -> Reference:
    with Npz(path) as file:
        stored = {name: keys for name, keys in STORED.items() if set(keys) <= set(file.names)}
        if not stored and IMAGES not in file.names:
            raise UserError(f'{path} is no reference: expected mu and sigma, or images in {IMAGES}; it '
                            f'contains {shown_names(file.names)}')
        meta = read_meta(file) if 'meta' in file.names else {}
        if missing := set(meta.get('arrays', ())) - set(file.names):
            raise UserError(f'{path} is damaged: it lacks {shown_names(missing)}. Make the reference again')
        statistics = {name: _read_statistics(file, *keys) for name, keys in stored.items()}
        images = NpzSet(path) if IMAGES in file.names else None
    if meta.get('count'):
        statistics = {name: stats._replace(count=meta['count']) for name, stats in statistics.items()}
    return Reference(path, statistics, images, meta)


def _read_statistics(file: Npz, mean: str, cov: str) -> Statistics:
    for name in (mean, cov):
        if file.header(name).dtype.kind != 'f':
            raise UserError(f'{file.path}: {name} is {file.header(name).dtype}, expected floating point')
    mu, sigma = (file.array(name).astype(np.float64) for name in (mean, cov))
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise UserError(f'{file.path}: {mean} has shape {list(mu.shape)} and {cov} {list(sigma.shape)}; '
                        f'expected [d] and [d, d]')
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f'{file.path}: {mean} or {cov} contains NaN or infinity; get the file again')
    return Statistics(mu, sigma)


def read_meta(file: Npz) -> dict:
    """The settings that made a reference. UserError if they are damaged, or of another format."""
    try:
        meta = parse_json(file.text('meta'), f'{file.path}: meta', _META)
    except UserError as error:
        raise UserError(f'{error}. Make the reference again') from error
    if meta.get('format') != FORMAT:
        raise UserError(f'{file.path}: meta was not written by `evaluate.py reference` of this version '
                        f'(format {shown(meta.get("format"))}, expected {FORMAT}). Make the reference again')
    return meta


def _check_space(reference: Reference, space: FeatureSpace) -> None:
    for name, width in zip(STORED, space.widths, strict=True):
        stats = reference.statistics.get(name)
        if width and stats is not None and len(stats.mean) != width:
            raise UserError(f'{reference.path}: {STORED[name][0]} has {len(stats.mean)} numbers, but the '
                            f'features of this evaluation ({space.facts["flavour"]}) have {width}; give a '
                            f'reference made with these features')
    if there := reference.meta.get('features'):      # else it is ADM's, of Inception's features
        there, now = ({key: facts.get(key) for key in ('flavour', 'sha256', 'precision')}
                      for facts in (there, space.facts))
        check_alike(there, now, 'there', 'now', f'{reference.path} was made with other features',
                    'Make the reference again with these, or give the weights it was made with.')
