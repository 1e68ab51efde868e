"""Scores an image set, or models under several settings, against one reference (`evaluate.py`).

All processes call `evaluate` together: each computes features of its own parts, process 0 the scores.
"""
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import jax
import numpy as np

import lit_jax
from lit_jax.checkpoint.load import find_steps, read_weights_config
from lit_jax.checkpoint.vae_folder import read_vae_config
from lit_jax.diffusion.settings import SCORES
from lit_jax.evaluation.evaluate_options import DRAWING, ScoreOptions
from lit_jax.evaluation.feature_store import FeatureStore, fingerprint
from lit_jax.evaluation.reference import Reference, open_reference
from lit_jax.evaluation.scores import OF_IMAGES, Scorer, Settings, impossible
from lit_jax.evaluation.sets import FirstOf, NpzSet, open_set
from lit_jax.evaluation.spaces import FeatureSpace, open_space
from lit_jax.evaluation.table import ROWS, keep_row, markdown, read_rows
from lit_jax.metrics.features import Features
from lit_jax.models.network import Network
from lit_jax.runtime import cluster, peers
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.options import given
from lit_jax.runtime.parts import make_missing
from lit_jax.runtime.paths import as_path, cache_folder, check_folder, prepare_folder, remove_tree
from lit_jax.sampling.draw import Plan, draw_parts, plan_images
from lit_jax.sampling.labels import choose_labels, class_names, parse_classes
from lit_jax.sampling.noise import check_seed
from lit_jax.sampling.pipelines import open_pipeline
from lit_jax.sampling.request import SampleRequest
from lit_jax.sampling.stores import NpzStore, part_size

LOG = logging.getLogger('lit_jax')
PACKAGES = ('jax', 'jaxlib', 'numpy', 'scipy')


def evaluate(request: ScoreOptions) -> str:
    """Scores what is asked for; returns the table of `score_rows`."""
    return f'{markdown(score_rows(request))}\nin {as_path(request.out) / ROWS}'


def score_rows(request: ScoreOptions) -> list[dict]:
    """Scores what is asked for; rows that `out` holds already are not computed again.

    Raises UserError for a request that cannot be met, before anything is drawn."""
    settings = Settings(request.metrics, request.pr_mode, request.is_mode).check()
    _check_request(request)
    check_folder(request.out, f'--out={request.out}')
    space = open_space(request.features, inception=request.inception, precision=request.precision)
    reference = peers.together(lambda: open_reference(request.reference, space))
    evaluation = Evaluation(request.out, space, reference, settings)
    if request.samples is not None:
        return [_score_set(request, evaluation)]
    jobs = peers.together(lambda: _plan_jobs(request, evaluation))
    return list(_score_models(request, evaluation, jobs))


class Evaluation:
    """Sets scored against one reference, with one feature space; rows go to `out`.

    Collective: with several processes all of them make one and call its methods together."""

    def __init__(self, out, space: FeatureSpace, reference: Reference, settings: Settings):
        self.out, self.space, self.reference, self.settings = as_path(out), space, reference, settings
        self.about = {'reference': peers.from_lead(reference.facts), 'features': space.facts,
                      'settings': settings.facts()}
        cluster.check_same({'features': space.facts, 'settings': settings.facts(), **cluster.code_facts()})
        self._scorer, self._said = None, set()

    def check(self, count: int, shape: tuple[int, int]) -> None:
        """Raises UserError where images of this shape cannot be compared, or nothing could be scored of so
        many."""
        real, wanted = self.reference.image_shape, self.space.image_shape
        if real is not None and tuple(shape) != tuple(real):
            raise UserError(f'the samples have {shape[1]}x{shape[0]} pixels, the reference '
                            f'{self.reference.path} has {real[1]}x{real[0]}; scores compare images of one '
                            f'resolution')
        if wanted is not None and tuple(shape) != tuple(wanted):
            raise UserError(f'the samples have {shape[1]}x{shape[0]} pixels, {self.space.facts["flavour"]} '
                            f'takes {wanted[1]}x{wanted[0]}')
        reasons = impossible(self.settings.metrics, self.space, self.reference, count)
        if len(reasons) == len(set(self.settings.metrics)):
            raise UserError('none of these scores is possible:\n  ' +
                            '\n  '.join(f'{name}: {why}' for name, why in reasons.items()))

    def score(self, name: str, images: dict, count: int, fill: Callable[[FeatureStore], None], *,
              labels: np.ndarray | None = None, group: int = 1, more: dict | None = None,
              keep_features: bool = True) -> dict:
        """The row of one set.

        Args:
            name: of the set, for people.
            images: what they are, JSON-able: equal for equal images in equal order.
            fill: gives all missing parts of a store their images; collective.
            labels: classes in file order.
            group: images that `fill` makes together.
            more: goes into the row's card beside name and count.
            keep_features: or delete them when the row is written.
        """
        card = {'samples': {'name': name, 'count': count, **(more or {})}, **self.about,
                'computed': versions()}
        identity = fingerprint({'samples': images, 'count': count, 'features': self.space.facts,
                                'reference': self.about['reference']['sha256'],
                                'settings': self.about['settings']})
        row = peers.from_lead(lambda: next((row for row in read_rows(self.out) if row['id'] == identity),
                                           None))
        row = row or {'id': identity, 'scores': {}, 'impossible': {}, 'notes': [], 'card': card}
        wanted = [metric for metric in self.settings.metrics
                  if metric not in {*row['scores'], *row['impossible']}]
        if not wanted:
            LOG.info('%s: scored already, in %s', name, self.out / ROWS)
            return row
        row['impossible'] |= impossible(wanted, self.space, self.reference, count)
        wanted = [metric for metric in wanted if metric not in row['impossible']]
        peers.only_lead(lambda: prepare_folder(self.out))
        # first: what is wrong with the reference shows before hours of drawing
        scorer = self._get_scorer() if wanted else None
        store = FeatureStore(self.out / 'features', self.space, images, count, group)
        if keep_features:
            row['card']['features_in'] = f'{store.out.parent.name}/{store.out.name}'
        with claimed(store.out):
            if wanted and peers.from_lead(store.begin):
                fill(store)
            with claimed(self.out / ROWS, wait=True):      # of all sets
                row = peers.from_lead(lambda: self._finish(row, store, scorer, wanted, labels))
            if not keep_features:
                peers.only_lead(lambda: remove_tree(store.out))
        return row

    def _finish(self, row: dict, store: FeatureStore, scorer: Scorer | None, wanted: list[str],
                labels) -> dict:
        if wanted:
            scores, notes = scorer.score(store.read(), wanted, labels)
            row['scores'] |= scores
            row['notes'] = list(dict.fromkeys([*row['notes'], *notes]))
            LOG.info('%s: %s', row['card']['samples']['name'],
                     ', '.join(f'{key} {value:.5g}' for key, value in scores.items()))
        remarks = [*row['notes'], *(f'{metric} is not possible: {why}'
                                    for metric, why in row['impossible'].items())]
        for text in remarks:
            if text not in self._said:
                LOG.warning('%s', text)
        self._said |= set(remarks)
        keep_row(self.out, row)
        return row

    def _get_scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = Scorer(self.space, self.reference, self._reference_features(), self.settings)
        return self._scorer

    def _reference_features(self) -> Features | None:
        """Of the reference's images; on process 0 only. Kept in the cache folder for all evaluations."""
        images = self.reference.images
        if images is None or self.reference.statistics and not set(OF_IMAGES) & set(self.settings.metrics):
            return None
        identity = {'sha256': self.about['reference']['sha256']}
        kept = FeatureStore(cache_folder() / 'features', self.space, identity, images.count)
        if peers.from_lead(lambda: not kept.missing()):
            return kept.read() if peers.is_lead() else None
        # The cache is each host's own; with several processes the parts go where all can see them.
        store = kept if cluster.process()[1] == 1 else FeatureStore(self.out / 'features', self.space,
                                                                    identity, images.count)
        LOG.info('features of the %d images of the reference, once', images.count)
        with claimed(store.out, wait=True):
            if peers.from_lead(store.begin):
                fill_from(images, store)
        return store.read() if peers.is_lead() else None


def fill_from(image_set, store: FeatureStore) -> None:
    """Features of a set of images into a store, by all processes."""
    def make(mine: list[int]):
        blocks = image_set.blocks([store.span(part) for part in mine])
        # to the end of the file, where checksums are compared
        for part, images in zip(mine, blocks, strict=True) if mine else ():
            store.write(part, images)
            yield

    make_missing(store, make, 'images looked at')


def versions() -> dict:
    """What computed a row, as far as it may matter."""
    return {**{name: importlib.metadata.version(name) for name in PACKAGES}, 'lit_jax': lit_jax.__version__,
            'code': cluster.code_facts()['lit_jax code'], 'device': jax.local_devices()[0].device_kind}


# ------------------------------------------------------------------------------------------------------
# A set of images


def _score_set(request: ScoreOptions, evaluation: Evaluation) -> dict:
    def look():
        images = open_set(request.samples)
        if request.num_samples is not None and request.num_samples > images.count:
            raise UserError(f'{request.samples} holds {images.count} images, '
                            f'--num_samples={request.num_samples} asks for more')
        if request.num_samples is not None and request.num_samples < images.count:
            images = FirstOf(images, request.num_samples)
        evaluation.check(images.count, images.shape)
        return images

    images = peers.together(look)
    sha256 = peers.from_lead(lambda: images.sha256)
    more = {'path': str(images.path), 'sha256': sha256, 'card': images.card}
    return evaluation.score(images.path.name, {'sha256': sha256}, images.count,
                            lambda store: fill_from(images, store), labels=images.labels, more=more)


# ------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class _Job:
    """One row of images to draw."""
    source: str
    checkpoint: int | None
    request: SampleRequest


def _plan_jobs(request: ScoreOptions, evaluation: Evaluation) -> list[_Job]:
    """Every combination that is asked for, all checked; no weights are read yet."""
    jobs = []
    for source in request.sources:
        config = read_weights_config(source)
        network = Network(config['model'])
        evaluation.check(request.num_samples, _image_shape(config, request, source))
        classes = parse_classes(request.classes, class_names(config, range(network.null_label)), most=None)
        choose_labels(request.labels, classes, seed=request.seed, count=request.num_samples)
        base = SCORES.of_kind(config).updated(replace(request, steps=None, cfg_scale=None))
        for checkpoint, steps, cfg_scale in itertools.product(
                _checkpoints(request, source), request.steps or (base.steps,),
                request.cfg_scale or (base.cfg_scale,)):
            settings = replace(base, steps=steps, cfg_scale=cfg_scale).check_model(config)
            wanted = SampleRequest(
                source=source, out=f'{request.out}/samples', count=request.num_samples, **asdict(settings),
                **{name: getattr(request, name)
                   for name in ('vae', 'classes', 'labels', 'seed', 'dtype', 'group', 'batch_size')})
            jobs.append(_Job(source, checkpoint, wanted))
    return jobs


def _checkpoints(request: ScoreOptions, source: str) -> list[int | None]:
    if not request.checkpoints:
        return [None]
    there = find_steps(source)
    if request.checkpoints == 'all':
        steps = there
    else:
        try:
            steps = [int(part) for part in request.checkpoints.split(',')]
        except ValueError:
            raise UserError(f"--checkpoints={request.checkpoints} is neither 'all' nor steps such as "
                            f"100000,200000") from None
    absent = sorted(set(steps) - set(there))
    if absent or not steps:
        which = f' of step {", ".join(map(str, absent))}' if absent else ''
        raise UserError(f'{source} has no checkpoint{which}; there are: '
                        f'{", ".join(map(str, there)) or "none"}. (config.checkpoint.keep_every keeps older '
                        f'ones.)')
    return steps


def _image_shape(config: dict, request: ScoreOptions, source: str) -> tuple[int, int]:
    sides = config['model']['input_size']
    if config['latent']['space'] == 'pixels':
        return tuple(sides)
    if not request.vae:
        raise UserError(f'{source} draws latents; scores need the VAE that decodes them: --vae=DIR (id '
                        f'{shown(config["latent"]["vae"])}; python convert_torch_ckpt.py DIFFUSERS_VAE '
                        f'--out DIR)')
    downscale = 2 ** (len(read_vae_config(request.vae)['vae']['widths']) - 1)
    return tuple(side * downscale for side in sides)


def _score_models(request: ScoreOptions, evaluation: Evaluation, jobs: list[_Job]) -> Iterator[dict]:
    for number, ((source, checkpoint),
                 group) in enumerate(itertools.groupby(jobs, key=lambda job: (job.source, job.checkpoint))):
        pipeline = open_pipeline(source, request.vae, step=checkpoint, dtype=request.dtype)
        if number == 0:
            LOG.info('%d rows to score, %d images each', len(jobs), request.num_samples)
        for job in group:
            yield _score_model(request, evaluation, job, plan_images(job.request, pipeline))
        pipeline.free('model')      # before those of the next are read


def _score_model(request: ScoreOptions, evaluation: Evaluation, job: _Job, plan: Plan) -> dict:
    LOG.info('%s: %s', job.source, plan.settings.describe())

    def draw(store: FeatureStore) -> None:
        if not request.keep_samples:
            draw_parts(plan, store)
            return
        out = as_path(request.out) / f'samples_{store.out.name}.npz'
        kept = NpzStore(out, plan.card, plan.shown, plan.shape, part_size(plan.group))
        if peers.from_lead(kept.begin) is not None:
            draw_parts(plan, kept)
        fill_from(NpzSet(out), store)

    return evaluation.score(str(job.source), {'card': plan.card}, len(plan), draw, labels=plan.shown,
                            group=plan.group, more={'card': plan.card})


def _check_request(request: ScoreOptions) -> None:
    check_seed(request.seed)
    if (request.samples is None) == (not request.sources):
        raise UserError(f'give one of --samples (images that are there) and --from (models to draw from), '
                        f'got {"neither" if request.samples is None else "both"}')
    if request.samples is not None:
        if foreign := given(request, DRAWING):
            raise UserError(f'{foreign[0]} belongs to --from: the images of --samples are there already')
    if request.num_samples is not None and request.num_samples < 1:
        raise UserError(f'--num_samples must be at least 1, got {request.num_samples}')
    if request.sources and request.num_samples is None:
        raise UserError('--from needs --num_samples; published figures are of 50000')
    if request.group < 1 or request.batch_size < 0:
        raise UserError(f'--group must be at least 1 and --batch_size not negative, got {request.group}, '
                        f'{request.batch_size}')
    for name in ('steps', 'cfg_scale', 'sources'):
        values = getattr(request, name)
        if len(set(values)) != len(values):
            raise UserError(f'--{"from" if name == "sources" else name} names a value twice: '
                            f'{" ".join(map(str, values))}')
