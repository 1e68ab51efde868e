"""Augmentations for the pipeline: (element, numpy Generator) -> element of the same shapes."""
import numpy as np

from lit_jax.data.crop import flip


def random_flip(element: dict, rng: np.random.Generator) -> dict:
    """Mirrors the image of an element in half of the cases.

    It looks at one raw bit of the generator: numpy promises the bits of a bit generator for all versions."""
    if rng.bit_generator.random_raw() >> 63:
        return {**element, 'image': flip(element['image'])}
    return element
