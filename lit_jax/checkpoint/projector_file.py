"""REPA's projectors (arXiv 2410.06940): data beside the weights of a model, kept under their PyTorch names.

They lead from the tokens of one block to the features of another network, and feed nothing that is sampled;
they are in projectors.npz of a model folder."""
import io
from collections.abc import Mapping

import numpy as np

FILE = 'projectors.npz'


def pack(projectors: Mapping[str, np.ndarray]) -> bytes:
    """Content of FILE."""
    file = io.BytesIO()
    np.savez(file, **{key: np.asarray(value, np.float32) for key, value in projectors.items()})
    return file.getvalue()


def read_file(folder) -> dict[str, np.ndarray]:
    """{PyTorch key: float32 array} of FILE in a folder; {} where there is none. UserError: it is damaged."""
    path = folder / FILE
    if not path.exists():
        return {}
    from lit_jax.runtime.npz_reader import Npz
    with Npz(path) as file:
        return {name: file.array(name) for name in sorted(file.names)}
