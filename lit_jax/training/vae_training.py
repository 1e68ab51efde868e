"""Trains a small VAE on a folder of images: `python train_vae.py --config=configs/vae_tiny.py`.

The loss is the mean absolute error of the reconstruction plus a small KL term (arXiv 2112.10752), without the
perceptual and adversarial terms of released VAEs: enough for small images, too smooth for large ones.

What is not done yet lies in OUT.unfinished (recipe.json, checkpoints/): a run that was stopped goes on from
there, bit for bit, and removes it at its end."""
import contextlib
import functools
import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.vae_folder import check_vae_target, save_vae_folder
from lit_jax.data.augment import random_flip
from lit_jax.data.folder import split_folder
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import Source, open_source
from lit_jax.models.vae import VaeNetwork, sample_posterior
from lit_jax.recipes.fields import check_fields
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import plain, read_json, sealed, unsealed
from lit_jax.runtime.paths import absolute, explain_unwritable, remove_tree, write_text_atomic
from lit_jax.runtime.progress import format_seconds, working
from lit_jax.runtime.signals import save_first

LOG = logging.getLogger('lit_jax')
RECIPE = 'recipe.json'
_FREE = ('log_every', 'save_every')      # of `train`: what may differ when a run goes on


def default() -> ConfigDict:
    """A VAE with four channels and downscale 4, and its training; configs/vae_*.py start from it."""
    return ConfigDict({
        'name': '', 'seed': 0,
        'data': {'name': 'folder', 'path': '', 'image_size': 64, 'strict': False},
        'vae': {'widths': (16, 32, 64), 'layers': 1, 'groups': 8, 'channels': 4, 'mid_attention': False,
                'quant_conv': False, 'post_quant_conv': False},
        'train': {'steps': 800, 'batch_size': 16, 'learning_rate': 2e-3, 'kl_weight': 1e-5, 'log_every': 100,
                  'save_every': 200,
                  'window': 32},      # side of the random part of each image that a step sees; 0: all of it
    }).lock()


def unit_latents(params: dict, factor: float) -> dict:
    """The same VAE with its latents multiplied by `factor`, so that recipes need no scale.
    Changes the encoder's last and the decoder's first convolution; needs a network without quant ones."""
    out, first = params['encoder']['conv_out'], params['decoder']['conv_in']
    channels = first['kernel'].shape[2]
    is_mean = jnp.arange(2 * channels) < channels       # means are scaled, log-variances shifted
    gain = jnp.where(is_mean, factor, 1.0)
    shift = jnp.where(is_mean, 0.0, 2 * math.log(factor))
    scaled = {**out, 'kernel': out['kernel'] * gain, 'bias': out['bias'] * gain + shift}
    return {**params, 'encoder': {**params['encoder'], 'conv_out': scaled},
            'decoder': {**params['decoder'], 'conv_in': {**first, 'kernel': first['kernel'] / factor}}}


@dataclass(frozen=True)
class Quality:
    """How well a VAE reconstructs images."""
    psnr: float          # dB, over all pixels of the mean reconstruction; the peak is 2
    latent_std: float    # standard deviation of all posterior means
    images: int


def train_vae(config: ConfigDict, out) -> Quality | None:
    """Trains and measures the recipe's VAE, and writes a VAE folder with latents of scale 1.

    None after SIGTERM or Ctrl-C: what there is was saved, and the next call goes on. Raises UserError for
    anything known before the first step, and if the loss is not finite."""
    check_fields(config, default())
    network = VaeNetwork(config.vae.to_dict())
    check_vae_target(out, overwrite=False)
    with claimed(out):
        return _train_vae(config, network, out)


def _train_vae(config: ConfigDict, network: VaeNetwork, out) -> Quality | None:
    train = open_images(config, 'train')
    aside = config.data.name != 'folder' or split_folder(absolute(config.data.path), 'held_out', needed=False)
    held_out = open_images(config, 'held_out') if aside else train
    unfinished = _Unfinished(config, train, out)
    with unfinished:
        params = fit(network, config.train, train, config.seed, unfinished)
    if params is None:
        return None
    with working('measuring how well the VAE restores images'):
        params = unit_latents(params, 1 / measure(network, params, train, limit=2_048).latent_std)
        quality = measure(network, params, held_out)
    save_vae_folder(out, {'vae': network.arch, 'id': config.name, 'scale': 1.0, 'provenance': {
        'source': f'{config.data.name} {config.data.path}', 'steps': config.train.steps, 'seed': config.seed,
        'psnr': quality.psnr}}, params)
    remove_tree(unfinished.folder)
    LOG.info('%s: PSNR %.2f dB on %s %s images, whose latents have a standard deviation of %.3f, in %s',
             config.name, quality.psnr, f'{quality.images:,}', 'held-out' if aside else 'training',
             quality.latent_std, out)
    return quality


class _Unfinished:
    """What a run has done so far, on disk. Raises UserError for that of another recipe or other images."""

    def __init__(self, config: ConfigDict, source: Source, out):
        out = absolute(out)
        self.folder = out.with_name(f'{out.name}.unfinished')
        recipe = config.to_dict()
        recipe['data'].pop('path')
        for name in _FREE:
            recipe['train'].pop(name)
        self._ours = plain({**recipe, 'images': getattr(source, 'identity', {})})
        self._checkpoints = Checkpoints(self.folder, keep_latest=2)
        if (self.folder / RECIPE).exists():
            stored = unsealed(read_json(self.folder / RECIPE, {}), self.folder / RECIPE)
            check_alike(stored, self._ours, 'there', 'in this recipe',
                        f'{self.folder} is an unfinished VAE of another recipe, or of other images',
                        'Give those again to go on, or delete it to begin anew.')

    def __enter__(self):
        return self._checkpoints.__enter__()

    def __exit__(self, *error):
        return self._checkpoints.__exit__(*error)

    def restore(self, state):
        """(state, steps done): the newest saved one, else the given one."""
        restored = self._checkpoints.restore_latest({**state, 'step': np.int32(0)})
        if restored is None:
            return state, 0
        saved, _, step = restored
        LOG.info('resumed from step %s', f'{step:,}')
        return {name: saved[name] for name in state}, step

    def save(self, state, step: int) -> None:
        with explain_unwritable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.folder / RECIPE, json.dumps(sealed(self._ours), indent=1) + '\n')
        self._checkpoints.save(step, {**state, 'step': np.int32(step)}, {})

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._checkpoints.wait()


def open_images(config: ConfigDict, split: str) -> Source:
    """The recipe's images. Raises UserError if the VAE cannot halve their sides."""
    network, size = VaeNetwork(config.vae.to_dict()), config.data.image_size
    if not 0 <= config.train.window <= size or config.train.window % network.downscale:
        raise UserError(f'train.window {config.train.window} must be a multiple of {network.downscale} up to '
                        f'data.image_size {size}, or 0 for whole images')
    if size % network.downscale:
        raise UserError(f'data.image_size {size} is not divisible by {network.downscale}, by which this VAE '
                        f'shrinks images')
    name, path, strict = config.data.name, config.data.path, config.data.strict
    return open_source(name, split=split, image_size=size, channels=network.arch['image_channels'], path=path,
                       data_dir=path, strict=strict)


def vae_loss(network: VaeNetwork, params: dict, image_BHWC: jax.Array, key: jax.Array, kl_weight: float):
    """(loss, {'l1', 'kl'}): mean |x - decoded sample| + kl_weight · mean KL(posterior | unit normal)."""
    mean, logvar = network.encode(params, image_BHWC)
    l1 = jnp.abs(image_BHWC - network.decode(params, sample_posterior(mean, logvar, key))).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
    return l1 + kl_weight * kl, {'l1': l1, 'kl': kl}


def fit(network: VaeNetwork, options: Mapping, source: Source, seed: int,
        unfinished: _Unfinished) -> dict | None:
    """The parameters after Adam with a cosine decay to zero; a function of the seed. None: asked to stop."""
    optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    key = jax.random.key(seed)
    params = jax.jit(network.init)(key)
    state, start = unfinished.restore({'params': params, 'opt': optimizer.init(params)})

    @jax.jit
    def step(state, image, number):
        loss = functools.partial(vae_loss, network, image_BHWC=image, kl_weight=options.kl_weight,
                                 key=jax.random.fold_in(key, number))
        (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state['params'])
        updates, opt = optimizer.update(gradient, state['opt'], state['params'])
        params = optax.apply_updates(state['params'], updates)
        return {'params': params, 'opt': opt}, {'total': total, **terms}

    augment = functools.partial(_window, options.window or source.spec.image_size)
    began, number, stop = time.perf_counter(), start, threading.Event()
    pipeline = make_pipeline(source, global_batch=options.batch_size, seed=seed, start_step=start,
                             augment=augment)
    with (working(lambda: f'training the VAE: step {number:,}/{options.steps:,}'),
          contextlib.closing(pipeline), contextlib.ExitStack() as listening):
        for number, batch in zip(range(start + 1, options.steps + 1), pipeline, strict=False):
            state, terms = step(state, batch['image'], number)
            if number == start + 1:
                jax.block_until_ready(terms)      # compiled and taken: now there is something to save
                listening.enter_context(save_first(stop.set, alone=True))
            last, stopping = number == options.steps, stop.is_set()
            saving = last or stopping or number % options.save_every == 0
            if saving or number % options.log_every == 0:
                terms = _checked(number, jax.device_get(terms))
            if last or number % options.log_every == 0:
                _log(number, options.steps, terms, (time.perf_counter() - began) / (number - start))
            if saving:
                unfinished.save(state, number)
            if stopping:
                unfinished.wait()
                LOG.warning('asked to stop: saved step %s of %s in %s; run the same command again to go on',
                            f'{number:,}', f'{options.steps:,}', unfinished.folder)
                return None
    return state['params']


def _window(side: int, element: dict, rng: np.random.Generator) -> dict:
    """A random square of the image, mirrored in half of the cases: neighbourhoods are enough."""
    image = random_flip(element, rng)['image']
    top, left = (rng.bit_generator.random_raw() % (length - side + 1) for length in image.shape[:2])
    return {**element, 'image': image[top:top + side, left:left + side]}


def _checked(number: int, terms: Mapping) -> Mapping:
    if not np.isfinite(terms['total']):
        raise UserError(f'step {number:,}: the loss is {terms["total"]}. Lower train.learning_rate')
    return terms


def _log(number: int, total: int, terms: Mapping, seconds: float) -> None:
    LOG.info('step %s/%s  l1 %.4f  kl %.3f  %.0f ms  ETA %s', f'{number:,}', f'{total:,}', terms['l1'],
             terms['kl'], 1e3 * seconds, format_seconds(seconds * (total - number)))


def measure(network: VaeNetwork, params: dict, source: Source, *, limit: int = 0,
            batch_size: int = 32) -> Quality:
    """Reconstruction from the posterior's mean, of `limit` images spread evenly (0: all)."""
    count = min(limit, len(source)) if limit else len(source)
    indices = np.arange(count) * len(source) // count

    @jax.jit
    def errors(params, image):
        mean, _ = network.encode(params, image)
        return jnp.square(network.decode(params, mean) - image).sum((1, 2, 3)), mean

    squares, means = [], []
    for start in range(0, count, batch_size):
        part = np.resize(indices[start:start + batch_size], batch_size)      # one shape, one compilation
        kept = len(indices[start:start + batch_size])
        square, mean = jax.device_get(errors(params, source.take(part)['image']))
        squares.append(square[:kept])
        means.append(mean[:kept])
    error = float(np.concatenate(squares).sum()) / (math.prod(source.spec.image_shape) * count)
    return Quality(10 * math.log10(4 / error), float(np.concatenate(means).std()), count)
