"""One function from noise and classes or captions to samples, shared by everything that draws."""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.diffusion.guidance import check_guidance, guide, guided_timesteps
from lit_jax.diffusion.samplers import SAMPLERS, sampling_schedule
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.noise import initial_noise, step_keys

Array = jax.Array


def make_sampler(network: Network, **options) -> Callable:
    """`build_sampler`, compiled."""
    return jax.jit(build_sampler(network, **options), compiler_options=network.inference_options())


def build_sampler(network: Network, *, train_steps: int = 1000, kind: str = 'linear', steps: int = 50,
                  method: str = 'ddpm', cfg_scale: float = 1.0, cfg_channels: int | str = 3,
                  cfg_interval: tuple[float, float] = (0.0, 1.0), eta: float = 0.0,
                  latent_scale: float = 1.0, on_step: Callable[[Array], None] | None = None) -> Callable:
    """sample(params, noise_BHWC, cond, key_B) -> pixels or latents [B, H, W, C], divided by `latent_scale`.

    cond: {'label': int [B]}, or the captions of a text model with the unconditional ones
        (`Network.guidance_pair`).

    Args:
        train_steps, kind: the schedule that the network was trained with.
        steps: evaluations of the model, spread over the schedule as DiT spreads them.
        method: name in SAMPLERS. eta: noise of ddim, 0 to 1; the others have no such choice.
        cfg_scale: classifier-free guidance, 1 = none; `cfg_channels`: noise channels it acts on, 3 as DiT's
            published numbers, or 'all'; `cfg_interval`: the part of the schedule in which it acts, 0 the
            image, 1 pure noise.
        on_step: called on this machine with the timestep of each evaluation, while the program runs: for
            progress.
    """
    schedule = sampling_schedule(method, steps, train_steps, kind)
    if eta and method != 'ddim':
        raise UserError(f'eta {eta:g} belongs to ddim; {method} has no such choice')
    if not 0 <= eta <= 1:
        raise UserError(f'eta must lie between 0 (no noise) and 1 (as much as ddpm), got {eta:g}')
    check_guidance(cfg_scale, cfg_channels)
    interval = guided_timesteps(cfg_interval, train_steps)

    def sample(params, noise, cond, key):
        def model_fn(x, t, cond):
            if on_step is not None:
                jax.debug.callback(on_step, t[0])
            return network.apply(params, x, t, cond)

        model_fn = guide(model_fn, cfg_scale, network.guidance_pair, cfg_channels, interval)
        x0 = SAMPLERS[method](model_fn, noise, cond, schedule=schedule, key=key, eta=eta)
        return x0.astype(jnp.float32) / latent_scale

    return sample


def sample_many(sample: Callable, params: dict, network: Network, labels: Sequence[int], *, seed: int,
                batch_size: int) -> np.ndarray:
    """Draws one image a label in batches of one size (one compile; the last batch is padded and cut).

    Another batch size is another program, which rounds differently: images are then equal to some 1e-6 of
    their range. `lit_jax.sampling.groups` draws the same bits whatever the batch and the devices.
    """
    labels = np.asarray(labels, np.int32)
    images = []
    for start in range(0, len(labels), batch_size):
        indices = np.arange(start, start + batch_size)
        part = np.resize(labels[start:start + batch_size], batch_size)
        images.append(np.asarray(sample(params, initial_noise(network, seed, indices), {'label': part},
                                        step_keys(seed, indices))))
    return np.concatenate(images)[:len(labels)]
