"""The features of the empty caption [L, C]: data beside the weights of a text-to-image model, no parameter.

They are in null_caption.npy of a model folder or workdir. Earlier versions stored them as a parameter; such
folders and checkpoints are read here and by callers of `without_null_caption`."""
import hashlib
import io
import re

import numpy as np

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import explain_unreadable

FILE = 'null_caption.npy'
LEAF = 'y_embedder/null_caption'      # among the parameters of earlier versions, and in PyTorch files


def pack(features: np.ndarray) -> bytes:
    """Content of FILE."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(features, np.float32), allow_pickle=False)
    return file.getvalue()


def read_file(folder) -> np.ndarray | None:
    """What FILE of a folder holds; None where there is none. UserError if it is damaged."""
    path = folder / FILE
    if not path.exists():
        return None
    with explain_unreadable(path):
        data = path.read_bytes()
    found = re.match(rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, 'shape': "
                     rb"\((\d{1,9}), (\d{1,9})\), \} *\n", data, re.DOTALL)
    if not found or 4 * int(found[1]) * int(found[2]) != len(data) - found.end():
        raise UserError(f'{path} is damaged; copy it again, or delete it to compute it from the text encoder')
    return np.frombuffer(data, np.float32, offset=found.end()).reshape(int(found[1]), int(found[2]))


def digest(features: np.ndarray) -> str:
    """The sha256 of FILE, as a config holds it."""
    return hashlib.sha256(pack(features)).hexdigest()


def checked(features: np.ndarray, told: str | None, folder) -> np.ndarray:
    """The features, or UserError if a config tells another digest of them; early workdirs tell none."""
    if told and told != digest(features):
        raise UserError(f'{folder / FILE} is not as it was written: config.json has another sha256 of it. '
                        f'Copy it again')
    return features


def without_null_caption(tree):
    """A tree of parameters, or of a train state, as earlier versions stored it -> without those leaves."""
    name = LEAF.rpartition('/')[2]
    if isinstance(tree, dict):
        return {key: without_null_caption(value) for key, value in tree.items() if key != name}
    return [without_null_caption(value) for value in tree] if isinstance(tree, list) else tree
