"""Random weights of FID-Inception under which features spread, in the layouts in which the real ones are
published."""
import functools
import hashlib
from pathlib import Path

import numpy as np
from goldens import weights

GOLDEN = Path(__file__).parent / 'goldens' / 'metrics_inception.npz'


@functools.cache
def golden() -> tuple[dict, dict, dict]:
    """(meta, PyTorch's state dict as numpy, outputs) of the golden file."""
    return weights.load(GOLDEN)


def torch_state() -> dict[str, np.ndarray]:
    return dict(golden()[1])


def pixels(side: int) -> np.ndarray:
    """The two uint8 images of the golden file for this side; of other sides likewise."""
    seed = golden()[0]['images']['seed']
    grid = -(-side // 8) * 8
    return weights.images(seed, f'size{side}', 2, grid, grid)[:, :side, :side]


def flax_tree(state: dict[str, np.ndarray]) -> dict:
    """The nested dict of the Flax port."""
    tree: dict = {}
    names = {'bn.weight': 'bn.scale', 'bn.running_mean': 'bn.mean', 'bn.running_var': 'bn.var',
             'conv.weight': 'conv.kernel', 'fc.weight': 'fc.kernel'}
    for key, value in state.items():
        for theirs, flax in names.items():
            key = key.removesuffix(theirs) + flax if key.endswith(theirs) else key
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        node = tree
        *parents, last = key.split('.')
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def named_by_digest(path: Path) -> Path:
    """Renames x.pth to x-<first digits of its sha256>.pth."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f'{path.stem}-{digest}{path.suffix}'))
