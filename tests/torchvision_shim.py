"""Lets the packages that are compared with import torchvision beside a CPU build of torch.

diffusers, too: it looks whether torchvision is installed, and then imports it.

torchvision's wheel from PyPI brings kernels for the CUDA build of torch. Beside a CPU build their library is
not loaded, and the import ends with "operator torchvision::nms does not exist". Nothing that is compared here
calls these operators: it is enough that they are declared.
"""
import functools
import importlib
from importlib.metadata import version
from types import ModuleType

_SIGNATURE = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'


def import_oracle(name: str) -> ModuleType:
    """A module of torch_fidelity, cleanfid, prdc or diffusers, for tests marked `peers`."""
    _declare_operators()
    return importlib.import_module(name)


@functools.cache
def _declare_operators():
    """Declares torchvision's operators where its own library will not; the cache keeps them alive."""
    import torch
    if '+cpu' not in torch.__version__ or '+' in version('torchvision'):
        return None
    library = torch.library.Library('torchvision', 'DEF')
    for operator in ('nms', 'qnms'):
        library.define(operator + _SIGNATURE)
    return library
