"""lit_jax: turns a trained diffusion transformer into a linear one, in JAX.

    import lit_jax
    model = lit_jax.load('models/dit_xl')                  # a model folder or a workdir of train.py
    images = model.sample(classes=[207, 360], vae='models/sd_vae')
"""
TYPE_CHECKING = False      # of `typing`, which takes long: commands listen to signals only after this file
if TYPE_CHECKING:
    from lit_jax.api import TrainedModel, convert_checkpoint, evaluate, inherit, load, recipe, to_pil
    from lit_jax.runtime.errors import UserError

__version__ = '0.2.0'
__all__ = ['TrainedModel', 'UserError', '__version__', 'convert_checkpoint', 'evaluate', 'inherit', 'load',
           'recipe', 'to_pil']


def __getattr__(name):
    # Imported when they are asked for: they pull in jax, flax and orbax (seconds).
    import importlib
    if name == 'UserError':
        return importlib.import_module('lit_jax.runtime.errors').UserError
    if name in __all__:
        importlib.import_module('lit_jax.runtime.chips').choose_cpu()
        return getattr(importlib.import_module('lit_jax.api'), name)
    raise AttributeError(f'module lit_jax has no attribute {name!r}')


def __dir__():
    return sorted(__all__)
