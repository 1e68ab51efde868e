"""The features of the empty caption [L, C]: data beside the weights of a text-to-image model, no parameter.

They are in null_caption.npy of a model folder or workdir. Earlier versions stored them as a parameter; such
folders and checkpoints are read here and by callers of `without_null_caption`."""
import io

import numpy as np

FILE = 'null_caption.npy'
LEAF = 'y_embedder/null_caption'      # among the parameters of earlier versions, and in PyTorch files


def pack(features: np.ndarray) -> bytes:
    """Content of FILE."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(features, np.float32), allow_pickle=False)
    return file.getvalue()


def read_file(folder) -> np.ndarray | None:
    """What FILE of a folder holds; None where there is none."""
    path = folder / FILE
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) if path.exists() else None


def without_null_caption(tree):
    """A tree of parameters, or of a train state, as earlier versions stored it -> without those leaves."""
    name = LEAF.rpartition('/')[2]
    if isinstance(tree, dict):
        return {key: without_null_caption(value) for key, value in tree.items() if key != name}
    return [without_null_caption(value) for value in tree] if isinstance(tree, list) else tree
