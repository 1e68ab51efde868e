"""lit_jax: turns a trained diffusion transformer into a linear one, in JAX.

    import lit_jax
    model = lit_jax.load('models/dit_xl')     # a model folder or a workdir of train.py
    y = model(x, t, label)                    # x [B, H, W, C] -> [B, H, W, 2C]: noise, then raw variance
                                              channels
"""
import importlib

from lit_jax.runtime.errors import UserError

__version__ = '0.2.0'
__all__ = ['UserError', 'load', '__version__']


# Imported when they are asked for: they pull in jax, flax and orbax (seconds).
_LAZY = {'load': 'lit_jax.checkpoint.load'}


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f'module lit_jax has no attribute {name!r}')
