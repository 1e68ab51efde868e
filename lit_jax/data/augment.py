"""Augmentations for the pipeline: (element, numpy Generator) -> element of the same shapes."""
import numpy as np

from lit_jax.data.crop import flip


def random_flip(element: dict, rng: np.random.Generator) -> dict:
    """Mirrors the image of an element with probability 1/2.

    Uses one raw bit of the generator: numpy guarantees raw bits across versions."""
    if rng.bit_generator.random_raw() >> 63:
        return {**element, 'image': flip(element['image'])}
    return element
