"""Recipes: the default one and its check, the table of sizes, the systems, the rows of the papers' tables."""
from lit_jax.recipes.recipe import (
    MOST_FSDP,
    SIZES,
    architecture,
    default,
    digits,
    finalize,
    is_text,
    linear_mixer,
    load_recipe,
    models_folder,
    shapes,
    size,
    softmax_mixer,
    text_to_image,
)

__all__ = ['MOST_FSDP', 'SIZES', 'architecture', 'default', 'digits', 'finalize', 'is_text', 'linear_mixer',
           'load_recipe', 'models_folder', 'shapes', 'size', 'softmax_mixer', 'text_to_image']
