"""From weights to pictures: one jitted function from noise and labels to samples, shared by everything that draws."""
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.load import load
from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.samplers import SAMPLERS
from lit_jax.diffusion.schedule import make_schedule
from lit_jax.errors import UserError
from lit_jax.evaluation.pictures import make_grid, save_png, viewable
from lit_jax.models.network import Network


def make_sampler(network: Network, **options) -> Callable:
    """`build_sampler`, compiled."""
    return jax.jit(build_sampler(network, **options), compiler_options=network.inference_options())


def build_sampler(network: Network, *, train_steps: int = 1000, kind: str = 'linear', steps: int = 50,
                  method: str = 'ddpm', cfg_scale: float = 1.0, cfg_channels: int | str = 3, eta: float = 0.0,
                  latent_scale: float = 1.0) -> Callable:
    """sample(params, noise_BHWC, labels_B, key) -> images or latents [B, H, W, C], divided by `latent_scale`.

    Args:
        train_steps, kind: the schedule that the network was trained with.
        steps: sampling steps, spread over the schedule as DiT spreads them.
        eta: noise of ddim, 0 to 1; ddpm has no such choice.
        cfg_scale: classifier-free guidance, 1 = none; `cfg_channels`: noise channels it acts on, 3 as DiT's published
            numbers, or 'all'.
    """
    if method not in SAMPLERS:
        raise UserError(f'unknown sampler {method!r}; known: {", ".join(SAMPLERS)}')
    if eta and method != 'ddim':
        raise UserError(f'eta {eta:g} belongs to ddim; {method} draws the noise that its variance asks for')
    schedule = make_schedule(train_steps, respacing=str(steps), kind=kind)

    def sample(params, noise, labels, key):
        def model_fn(x, t, cond):
            return network.apply(params, x, t, cond)

        model_fn = guide(model_fn, cfg_scale, network.null_label, cfg_channels)
        x0 = SAMPLERS[method](model_fn, noise, {'label': labels}, schedule=schedule, key=key, eta=eta)
        return x0.astype(jnp.float32) / latent_scale

    return sample


def initial_noise(network: Network, seed: int, indices: Sequence[int]) -> jax.Array:
    """Noise [B, H, W, C] of the images with these indices: image i depends on (seed, i) only."""
    shape = (*network.arch['input_size'], network.arch['channels'])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample_many(sample: Callable, params: dict, network: Network, labels: Sequence[int], *, seed: int,
                batch_size: int) -> np.ndarray:
    """Draws one image a label in batches of one size (one compile; the last batch is padded and cut)."""
    labels = np.asarray(labels, np.int32)
    images = []
    for start in range(0, len(labels), batch_size):
        indices = np.arange(start, start + batch_size)
        part = np.resize(labels[start:start + batch_size], batch_size)
        key = jax.random.fold_in(jax.random.key(seed + 1), start)
        images.append(np.asarray(sample(params, initial_noise(network, seed, indices), part, key)))
    return np.concatenate(images)[:len(labels)]


def parse_classes(text: str, num_classes: int) -> list[int]:
    """'3,7' -> [3, 7], checked against the model; '' -> the first ten classes."""
    if not text:
        return list(range(min(10, num_classes)))
    try:
        classes = [int(part) for part in text.split(',')]
    except ValueError:
        raise UserError(f'--classes {text!r} is not a list of class indices such as 3,7') from None
    if wrong := [c for c in classes if not 0 <= c < num_classes]:
        raise UserError(f'class {", ".join(map(str, wrong))} is out of range; this model knows 0..{num_classes - 1}')
    return classes


def draw_grid(source, out, *, classes: str, per_class: int, cfg_scale: float, cfg_channels: int | str, steps: int,
              method: str, eta: float, seed: int, dtype: str) -> str:
    """What `sample.py` does: loads, samples, writes a PNG with one row a class, and returns one line about it."""
    if per_class < 1:
        raise UserError(f'--per_class must be at least 1, got {per_class}')
    model = load(source, dtype=dtype)
    config, network = model.config, model.network
    labels = np.repeat(parse_classes(classes, network.null_label), per_class)
    sample = make_sampler(network, train_steps=config['diffusion']['steps'], kind=config['diffusion']['kind'],
                          steps=steps, method=method, cfg_scale=cfg_scale,
                          cfg_channels=cfg_channels if cfg_channels == 'all' else int(cfg_channels), eta=eta,
                          latent_scale=config['latent']['scale'])
    started = time.perf_counter()
    images = sample_many(sample, model.params, network, labels, seed=seed, batch_size=min(len(labels), 64))
    save_png(out, make_grid(viewable(images), columns=per_class, scale=max(1, 32 // images.shape[1])))
    note = '' if config['latent']['space'] == 'pixels' else ' (latents in false colours: this model has no VAE yet)'
    return (f'wrote {out}: {len(labels)} pictures, {method}, {steps} steps, cfg {cfg_scale:g}, '
            f'{time.perf_counter() - started:.1f} s{note}')
