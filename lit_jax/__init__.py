"""lit_jax: turns a trained diffusion transformer into a linear one, in JAX.

    import lit_jax
    model = lit_jax.load('models/dit_xl')     # a model folder or a workdir of train.py
    y = model(x, t, label)                    # x [B, H, W, C] -> [B, H, W, 2C]: noise, then raw variance
                                              channels
"""
from lit_jax.runtime.errors import UserError

__version__ = '0.1.0'
__all__ = ['UserError', 'load', '__version__']


def __getattr__(name):
    # `load` pulls in jax, flax and orbax (seconds): only when asked for.
    if name == 'load':
        from lit_jax.checkpoint.load import load
        return load
    raise AttributeError(f'module lit_jax has no attribute {name!r}')
