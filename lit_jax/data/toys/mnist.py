"""10,000 real handwritten digits of MNIST, 28x28 grey, ten classes: the data of the demo, in assets/."""
import hashlib

import numpy as np

from lit_jax.data.base import ArraySource, Spec
from lit_jax.runtime.errors import UserError, check_known
from lit_jax.runtime.npz_reader import DAMAGE
from lit_jax.runtime.shipped import find_asset

FILE = 'mnist_10k.npz'
SIZE, CLASSES = 28, 10
SPEC = Spec(image_size=SIZE, channels=1, num_classes=CLASSES,
            class_names=tuple(str(i) for i in range(CLASSES)))
# sha256 over uint8 pixels and labels (int32, little-endian): another edition would change every result.
SHA256 = '9cd16798dcad0d781bfa58686e93b30512d05a85812389f5b9f15c09c24dbe93'
SPLITS = ('train', 'held_out')
HELD_OUT = 5      # every fifth digit of each class is never trained on


def open_mnist(split: str) -> ArraySource:
    """Images float32 [28, 28, 1] = pixels / 127.5 - 1 in [-1, 1], labels 0..9: 8,000 of 'train', 2,000 of
    'held_out'. Raises UserError for another split, and if the file is missing or damaged."""
    check_known('split of mnist', split, SPLITS)
    pixels, labels = _read()
    held_out = np.arange(len(labels)) % HELD_OUT == HELD_OUT - 1      # the file is sorted by label
    chosen = held_out if split == 'held_out' else ~held_out
    return ArraySource(SPEC, pixels[chosen, :, :, None].astype(np.float32) / 127.5 - 1, labels[chosen])


def _read() -> tuple[np.ndarray, np.ndarray]:
    path = find_asset(FILE)
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file['image'], file['label'].astype('<i4')
        intact = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest() == SHA256
    except DAMAGE:
        intact = False
    if not intact:
        raise UserError(f'{path} is missing or damaged. It comes with lit_jax: install it again, or restore '
                        f'it with git checkout assets/{FILE}')
    return pixels, labels.astype(np.int32)
