"""The function from noise and classes or captions to samples, shared by everything that draws."""
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lit_jax.diffusion.guidance import guide
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import Network
from lit_jax.sampling.noise import initial_noise, step_keys

Array = jax.Array


def build_sampler(network: Network, settings: SamplerSettings, config: Mapping,
                  on_step: Callable[[Array], None] | None = None) -> Callable:
    """sample(params, noise_BHWC, cond, key_B) -> pixels or latents [B, H, W, C], divided by their scale.
    In the place of keys, samplers take the noise of their steps [steps, B, H, W, C] as a fifth argument.

    cond: {'label': int [B]}, or captions with the unconditional ones (`Network.guidance_pair`).
    config: of the model or its recipe: `diffusion` (`lit_jax.diffusion.kinds`) and the scale of `latent`.
    on_step: called on the host with the timestep of each evaluation while the program runs."""
    settings.check(config['diffusion'])
    diffusion = read_diffusion(config['diffusion'])
    run, interval = diffusion.sampler(settings), diffusion.guided_times(settings.cfg_interval)

    def sample(params, noise, cond, key, step_noise=None):
        def model_fn(x, t, cond):
            if on_step is not None:
                jax.debug.callback(on_step, t[0])
            return network.apply(params, x, t, cond)

        model_fn = guide(model_fn, settings.cfg_scale, network.guidance_pair, settings.cfg_channels, interval,
                         one_time=settings.method != 'dopri5')
        x0 = run(model_fn, noise, cond, key=key, noise=step_noise)
        return x0.astype(jnp.float32) / config['latent']['scale']

    return sample


def build_draw(network: Network, settings: SamplerSettings, config: Mapping, *, vae=None,
               size: tuple[int, int] | None = None, on_step: Callable | None = None) -> Callable:
    """draw((params, VAE params), rows of `Images`) -> [B, H, W, C] of the `Vae`, or (None) of the model."""
    sample = build_sampler(network, settings, config, on_step)

    def draw(weights, rows):
        params, vae_params = weights
        noise = initial_noise(network, rows['seed'], rows['number'], size)
        images = sample(params, noise, rows['cond'], step_keys(rows['seed'], rows['number']))
        if vae is None:
            return images
        # One by one: an image's decoding takes far more memory than its denoising.
        return vae.network.decode(vae_params, images + vae.shift, one_by_one=True).astype(jnp.float32)

    return draw
