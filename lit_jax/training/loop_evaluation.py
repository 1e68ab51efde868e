"""Scores samples of the EMA weights while training, as `evaluate.py` scores a checkpoint.

Rows with their recipe cards go to WORKDIR/eval/scores.json; an interrupted evaluation is resumed. The weights
with the best score so far are kept as a model folder in WORKDIR/best."""
import logging
from dataclasses import asdict

import jax
from ml_collections import ConfigDict

from lit_jax.checkpoint.model_folder import is_model_folder, read_config, save_model_folder
from lit_jax.diffusion.settings import CLASSES
from lit_jax.evaluation.evaluation import Evaluation
from lit_jax.evaluation.reference import open_reference
from lit_jax.evaluation.scores import Settings
from lit_jax.evaluation.spaces import open_space
from lit_jax.models.network import Model, Network
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.draw import draw_parts, plan_images
from lit_jax.sampling.labels import choose_labels
from lit_jax.sampling.pipelines import ClassPipeline
from lit_jax.sampling.request import SampleRequest
from lit_jax.training.mesh import replicated, without_mesh

LOG = logging.getLogger('lit_jax')
LOWER_IS_BETTER = ('fid', 'sfid', 'kid', 'skid')
BEST = 'best'


class LoopEvaluation:
    """Draws and scores samples of the EMA weights of one run; collective, as its methods are.
    The constructor checks all inputs. about: of the model (`lit_jax.training.setup.describe`)."""

    def __init__(self, config: ConfigDict, network: Network, mesh, vae, workdir, about: dict):
        wanted = config.eval
        _check_wanted(config, vae)
        self._config, self._workdir, self._about = config, workdir, about
        self._whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
        settings = Settings(tuple(name.strip() for name in wanted.metrics.split(','))).check()
        space = open_space(wanted.features, inception=wanted.inception)
        reference = peers.together(lambda: open_reference(wanted.reference, space))
        self._evaluation = Evaluation(workdir / 'eval', space, reference, settings)
        self._pipeline = ClassPipeline(Model(network, None, about), vae)
        for prefix in ('', 'full_'):
            if wanted[f'{prefix}every']:
                self._evaluation.check(wanted[f'{prefix}num_samples'], self._pipeline.nominal_size)
                choose_labels(wanted.labels, range(network.null_label), seed=config.seed,
                              count=wanted[f'{prefix}num_samples'])

    def samples_due(self, step: int) -> int:
        wanted = self._config.eval
        if wanted.full_every and step % wanted.full_every == 0:
            return wanted.full_num_samples
        return wanted.num_samples if wanted.every and step % wanted.every == 0 else 0

    def scores(self, step: int, ema: dict, count: int) -> dict[str, float]:
        """{'eval/fid_cfg1.5': ...} of `count` samples per guidance scale of the recipe, on every process."""
        # A whole copy on one device of each host; the samplers copy it to the others.
        weights = jax.tree.map(lambda leaf: leaf.addressable_data(0), self._whole(ema))
        provenance = {'source': str(self._workdir), 'weights': 'ema', 'step': step}
        self._pipeline.replace_weights(weights, provenance)
        scores = {'eval/num_samples': count}
        with without_mesh():
            rows = {scale: self._score(step, float(scale), count)['scores']
                    for scale in self._config.eval.cfg_scales}
        self._pipeline.free('model')      # training needs the memory until the next evaluation
        return scores | {f'eval/{name}_cfg{scale:g}': row[name] for scale, row in rows.items()
                         for name in self._evaluation.settings.metrics if name in row}

    def keep_best(self, step: int, ema: dict, scores: dict[str, float]) -> None:
        """Writes WORKDIR/best if this is the best score so far, over the guidance scales."""
        name = self._config.eval.best
        values = [value for key, value in scores.items() if key.startswith(f'eval/{name}_cfg')]
        if not name or not values:
            return
        lower, path = name in LOWER_IS_BETTER, self._workdir / BEST
        value = (min if lower else max)(values)
        before = peers.from_lead(lambda: _score_of(path, name, scores['eval/num_samples']))
        if before is not None and (value >= before if lower else value <= before):
            return
        provenance = {'source': str(self._workdir), 'weights': 'ema', 'step': step,
                      'score': {'name': name, 'value': value, 'samples': scores['eval/num_samples']}}
        save_model_folder(path, {**self._about, 'provenance': provenance}, ema, overwrite=True)
        LOG.info('best %s so far: %.4g, kept in %s', name, value, path)

    def _score(self, step: int, scale: float, count: int) -> dict:
        wanted, config = self._config.eval, self._config
        settings = CLASSES.updated(wanted, cfg_scale=scale)
        plan = plan_images(SampleRequest(source=str(self._workdir), count=count, labels=wanted.labels,
                                         seed=config.seed, batch_size=wanted.batch_size, **asdict(settings)),
                           self._pipeline)
        return self._evaluation.score(f'step {step:,}', {'card': plan.card}, count,
                                      lambda store: draw_parts(plan, store), labels=plan.shown,
                                      group=plan.group, more={'card': plan.card}, keep_features=False)


def _check_wanted(config: ConfigDict, vae) -> None:
    if not config.eval.reference:
        raise UserError('eval.every asks for scores, and eval.reference names nothing to compare with: give '
                        'an .npz of ADM, or make one: python evaluate.py reference --help')
    if config.latent.space == 'vae' and vae is None:
        raise UserError('eval.every asks for scores of images, and this model draws latents: give '
                        'latent.vae_path, the folder of the VAE')


def _score_of(path, name: str, samples: int) -> float | None:
    """The score of the weights in WORKDIR/best; None if there is no comparable one."""
    score = read_config(path)['provenance'].get('score', {}) if is_model_folder(path) else {}
    return score.get('value') if (score.get('name'), score.get('samples')) == (name, samples) else None
