"""GenEval's tasks for rendered shapes: prompts in the words of the training captions, scored in memory.

Rules: lit_jax/metrics/geneval/rules.py; objects: lit_jax/metrics/toys/shapes_detector.py."""
import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from lit_jax.data.base import random_generator
from lit_jax.data.toys.shapes import NOMINAL, Shape, place_shapes
from lit_jax.data.toys.shapes_words import CLASSES, COLOURS, NUMBERS, RELATIONS, pair, phrase
from lit_jax.metrics.geneval.detector import Detector, Pixels
from lit_jax.metrics.geneval.rules import judge, summarise
from lit_jax.metrics.toys.shapes_detector import ShapesDetector
from lit_jax.runtime.errors import UserError, shown

COLOUR_PAIRS = 24         # prompts of color_attr, of 180 possible ones: as many as of position


@cache
def make_shape_prompts() -> tuple[dict, ...]:
    """The 84 prompts, in the form of geneval_prompts.py. Shared by all callers: do not change them.

    All possible ones of single_object (3), two_object (6), counting (9), colors (18) and position (24); 24 of
    color_attr, four per pair of classes. Texts are unique, and each is a caption of the training set."""
    pairs = list(itertools.permutations(CLASSES, 2))
    return (*(_prompt('single_object', [_object(name)], phrase(name)) for name in CLASSES),
            *(_prompt('two_object', [_object(a), _object(b)], pair(phrase(a), phrase(b))) for a, b in pairs),
            *(_prompt('counting', [_object(name, count)], phrase(name, count=count),
                      exclude=[_object(name, count + 1)])
              for name in CLASSES for count in NUMBERS),
            *(_prompt('colors', [_object(name, color=colour)], phrase(name, colour)) for name in CLASSES
              for colour in COLOURS),
            *(_prompt('position', [_object(b), _object(a, position=[relation, 0])],
                      pair(phrase(a), phrase(b), relation))
              for a, b in pairs for relation in RELATIONS),
            *(_prompt('color_attr', [_object(a, color=first), _object(b, color=second)],
                      pair(phrase(a, first), phrase(b, second)))
              for (a, b), (first, second) in zip(pairs * (COLOUR_PAIRS // len(pairs)), _colour_pairs(),
                                                 strict=True)))


def score_images(images_by_prompt: Mapping[str, np.ndarray | Sequence[np.ndarray]],
                 detector: Detector | None = None) -> dict:
    """`rules.summarise` of the images, with `results`: image, task, prompt, correct and reasons of each.

    images_by_prompt: text of a prompt of `make_shape_prompts` -> its images, uint8 [n, H, W, 3], for example
    from `to_uint8` in lit_jax/report/grids.py. Tasks without images are left out of the mean."""
    prompts = {prompt['prompt']: prompt for prompt in make_shape_prompts()}
    detector, results = detector or ShapesDetector(), []
    for text, images in images_by_prompt.items():
        if text not in prompts:
            raise UserError(f'{shown(text)} is no prompt of shapes; make_shape_prompts() lists them, such as '
                            f'{shown(next(iter(prompts)))}')
        for number, image in enumerate(images):
            name = f'{text} {number}'
            verdict = judge(Pixels(name, _checked(image, text)), prompts[text], detector)
            results.append({'image': name, 'task': prompts[text]['tag'], 'prompt': text,
                            'correct': verdict.correct, 'reasons': list(verdict.reasons)})
    if not results:
        raise UserError('there is no image to score; give at least one of one prompt')
    return summarise(results) | {'results': results}


def draw_prompt(prompt: dict, rng: np.random.Generator, image_size: int = NOMINAL) -> tuple[Shape, ...]:
    """Shapes that fit a prompt, random where it is open: ground truth for `shapes.render`."""
    # The object that refers to the other comes first.
    wanted = prompt['include'][::-1] if prompt['tag'] == 'position' else prompt['include']
    names = [one['class'] for one in wanted for _ in range(one['count'])]
    colours = [one.get('color') or COLOURS[int(rng.integers(len(COLOURS)))] for one in wanted
               for _ in range(one['count'])]
    return place_shapes(rng, names, colours, image_size, wanted[0].get('position', ('',))[0])


def _colour_pairs() -> list[tuple[str, str]]:
    """Random different pairs of different colours, always the same."""
    pairs = list(itertools.permutations(COLOURS, 2))
    return [pairs[i] for i in random_generator(0, 'shapes prompts', 0).permutation(len(pairs))[:COLOUR_PAIRS]]


def _object(name: str, count: int = 1, **rest) -> dict:
    return {'class': name, 'count': count, **rest}


def _prompt(task: str, include: list[dict], text: str, **exclude) -> dict:
    return {'tag': task, 'include': include, **exclude, 'prompt': text}


def _checked(image: np.ndarray, text: str) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f'an image of {shown(text)} is {image.dtype} {list(image.shape)}, expected uint8 '
                        f'[H, W, '
                        '3]; make it with to_uint8')
    return image
