"""Recipes: the default one and its check, the table of sizes, the systems, the rows of the papers' tables."""
import importlib

__all__ = ['MOST_FSDP', 'SIZES', 'architecture', 'default', 'digits', 'fast', 'finalize', 'flow', 'is_text',
           'lightningdit', 'linear_mixer', 'load_recipe', 'mixer', 'mnist', 'mnist_flow', 'models_folder',
           'shapes', 'size', 'softmax_mixer', 'student', 'text_to_image']


def __getattr__(name):
    # recipe.py imports jax (seconds), which finding a recipe does not need.
    if name in __all__:
        module = 'students' if name in ('student', 'fast') else 'recipe'
        return getattr(importlib.import_module(f'lit_jax.recipes.{module}'), name)
    raise AttributeError(f'module {__name__} has no attribute {name!r}')
