"""Measures the models of the shapes demo: the six tasks of GenEval, scored by an exact detector of shapes.

All models draw the same prompts from the same noise: image k of prompt p has the seed 100·p + k.
"""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from examples.ruler import row
from lit_jax.checkpoint.load import load
from lit_jax.diffusion.settings import PROMPTS
from lit_jax.metrics.toys.shapes_prompts import make_shape_prompts, score_images
from lit_jax.report.grids import to_uint8
from lit_jax.sampling.pipelines import TextPipeline

SETTINGS = replace(PROMPTS, cfg_scale=1.5)
IMAGES, SINGLES = 4, 16       # per prompt, as in GenEval; more for the three prompts of single objects
GROUP = 32


def draw(pipeline: TextPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """uint8 [N, H, W, 3], one image per prompt and seed."""
    return to_uint8(pipeline.draw(pipeline.encode(prompts, seeds), SETTINGS, group=GROUP))


def measure(encoder: Path, path: Path) -> dict[str, float]:
    """{'overall', score of each task} of the model in `path`."""
    pipeline = open_pipeline(path, encoder)
    drawn = [(prompt['prompt'], 100 * number + k) for number, prompt in enumerate(make_shape_prompts())
             for k in range(SINGLES if prompt['tag'] == 'single_object' else IMAGES)]
    prompts, seeds = zip(*drawn, strict=True)
    images = draw(pipeline, prompts, seeds)
    by_prompt = {prompt: images[[i for i, one in enumerate(prompts) if one == prompt]]
                 for prompt in dict.fromkeys(prompts)}
    scores = score_images(by_prompt)
    return {'overall': scores['overall'], **scores['tasks']}


def open_pipeline(path: Path, encoder: Path) -> TextPipeline:
    return TextPipeline(path, text_encoder=encoder, text_dtype='float32')


def tell(measured: Mapping[str, float]) -> str:
    """The figures of one model as a line."""
    return ', '.join(f'{name.replace("_", " ")} {value:.2f}' for name, value in measured.items())


def summarise(runs: Mapping[str, list[dict]], models: Mapping[str, Path], teacher_steps: int) -> dict:
    """The table of the report, JSON-able: one row per kind of model, with means over its seeds.

    The teacher is first. teacher_steps: of all its runs; its checkpoint only knows those of the last."""
    rows = [row(name, load(models[name]), measured) for name, measured in runs.items()]
    rows[0]['steps'] = teacher_steps
    for one in rows:
        one['ratio'] = one['overall'] / rows[0]['overall'] if rows[0]['overall'] else float('nan')
        one['steps_ratio'] = one['steps'] / rows[0]['steps']
    sampler = {name: getattr(SETTINGS, name) for name in ('method', 'steps', 'cfg_scale', 'cfg_channels')}
    return {'rows': rows, 'samples': {**sampler, 'pictures': IMAGES, 'singles': SINGLES}}
