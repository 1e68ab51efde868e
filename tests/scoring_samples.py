"""A judge of digits that was hardly trained, images of digits, and a reference of them."""
import numpy as np
from sklearn.datasets import load_digits

from lit_jax.metrics.toys.digits_judge import train_judge


def digits_uint8(count=None, first=0):
    """uint8 [n, 8, 8, 3] real digits, and their labels."""
    digits = load_digits()
    images = np.clip(127.5 * (digits.images / 8 - 1) + 128, 0, 255).astype(np.uint8)[first:][:count]
    return np.repeat(images[..., None], 3, axis=-1), digits.target[first:][:count]


def save_judge(path):
    """A judge of three steps: its features differ between images, and that is all."""
    images, labels = digits_uint8(200)
    train_judge(images[..., :1].astype(np.float32) / 127.5 - 1, labels, steps=3).save(path)
    return path
