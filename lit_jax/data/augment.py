"""Augmentations for the pipeline: (element, numpy Generator) -> element of the same shapes."""
import numpy as np

from lit_jax.data.crop import flip


def random_flip(element: dict, rng: np.random.Generator) -> dict:
    """Mirrors an image with probability 1/2, by one raw bit: numpy keeps these the same in all versions."""
    if rng.bit_generator.random_raw() >> 63:
        return {**element, 'image': flip(element['image'])}
    return element
