"""From weights to images: noise of an image's own, one program for all of them, grids, files and .npz
sets."""
from lit_jax.sampling.noise import initial_noise, step_keys
from lit_jax.sampling.program import build_sampler, make_sampler, sample_many

__all__ = ['build_sampler', 'initial_noise', 'make_sampler', 'sample_many', 'step_keys']
