"""Prompts of shapes: worded as the captions are, and scored right where images are right, and only there."""
from collections import Counter

import numpy as np
import pytest

from lit_jax.data.toys.shapes import ShapesSource, render
from lit_jax.data.toys.shapes_words import all_captions
from lit_jax.metrics.geneval.geneval_prompts import COLOURS, RELATIONS, TASKS
from lit_jax.metrics.toys.shapes_prompts import draw_prompt, make_shape_prompts, score_images
from lit_jax.report.grids import to_uint8
from lit_jax.runtime.errors import UserError

PROMPTS = {prompt['prompt']: prompt for prompt in make_shape_prompts()}


def true_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return {text: np.stack([to_uint8(render(draw_prompt(prompt, rng))) for _ in range(count)])
            for text, prompt in PROMPTS.items()}


def test_every_task_has_its_prompts_and_each_is_a_caption():
    assert Counter(prompt['tag']
                   for prompt in PROMPTS.values()) == dict(zip(TASKS, (3, 6, 9, 18, 24, 24), strict=True))
    assert len(PROMPTS) == len(make_shape_prompts()) and set(PROMPTS) <= set(all_captions())


def test_prompts_are_the_first_captions_of_training_scenes():
    """The word of the task is the word of the training set: what is scored has been trained."""
    source = ShapesSource()
    said = {(scene.kind, scene.captions[0]) for scene in (source.scene(i) for i in range(6000))}
    assert {(prompt['tag'], text) for text, prompt in PROMPTS.items()} <= said


def test_the_form_is_that_of_geneval():
    circle = PROMPTS['a circle left of a square']
    assert circle == {'tag': 'position', 'include': [{'class': 'square', 'count': 1}, {
        'class': 'circle', 'count': 1, 'position': ['left of', 0]}], 'prompt': 'a circle left of a square'}
    assert PROMPTS['three squares']['exclude'] == [{'class': 'square', 'count': 4}]
    assert {one['color'] for prompt in PROMPTS.values() for one in prompt['include']
            if 'color' in one} <= set(COLOURS)
    assert {one['position'][0] for prompt in PROMPTS.values() for one in prompt['include']
            if 'position' in one} == set(RELATIONS)


def test_the_drawn_pairs_have_not_changed():
    pairs = [text for text, prompt in PROMPTS.items() if prompt['tag'] == 'color_attr']
    assert pairs[:2] == ['a purple circle and an orange square', 'a yellow circle and a blue triangle']


def test_true_images_score_one():
    scores = score_images(true_images(4))
    assert scores['overall'] == 1.0 and scores['tasks'] == dict.fromkeys(TASKS, 1.0)
    assert scores['pictures'] == 4 * 84 and scores['prompts'] == 84 and scores['results'][0]['reasons'] == []


def test_images_of_other_prompts_score_low():
    """The images of each task passed on by one prompt: what differs is all that the task is about."""
    images = true_images(2)
    moved = {}
    for task in TASKS[2:]:
        texts = [text for text, prompt in PROMPTS.items() if prompt['tag'] == task]
        moved |= dict(zip(texts, (images[text] for text in texts[1:] + texts[:1]), strict=True))
    assert score_images(moved)['tasks'] == dict.fromkeys(TASKS[2:], 0.0)
    texts = list(PROMPTS)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(texts))
        scores = score_images({text: images[texts[i]] for text, i in zip(texts, order, strict=True)})
        assert scores['overall'] < 0.35 and scores['tasks']['counting'] < 0.3 and scores['tasks'][
            'color_attr'] < 0.3


def test_noise_and_empty_images_score_nothing():
    rng = np.random.default_rng(0)
    for image in (to_uint8(rng.standard_normal((32, 32, 3))), np.full((32, 32, 3), 200, np.uint8)):
        scores = score_images({text: [image] for text in PROMPTS})
        assert scores['overall'] == 0 and all(result['reasons'] for result in scores['results'])


def test_a_subset_of_the_prompts_is_scored_by_itself():
    images = true_images(1)
    scores = score_images({'a circle': images['a circle'], 'two circles': images['three circles']})
    assert scores['tasks'] == {'single_object': 1.0, 'counting': 0.0} and scores['overall'] == 0.5
    assert scores['results'][1]['reasons'] == ['expected fewer than 3 circle, found 3']


@pytest.mark.parametrize('given, words', [({'a pink circle': []}, 'no prompt of shapes'), ({}, 'no image'), (
    {'a circle': [np.zeros((32, 32, 3))]}, 'to_uint8'),
                                          ({'a circle': [np.zeros((32, 32), np.uint8)]}, 'uint8')])
def test_bad_input_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        score_images(given)
