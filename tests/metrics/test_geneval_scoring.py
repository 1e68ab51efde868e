"""GenEval's rules on boxes made up for each of them."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.metrics.geneval.detector import Detection, Pixels
from lit_jax.metrics.geneval.rules import judge, keep_confident, relations, summarise

IMAGE = Pixels('00000/samples/0000.png', np.zeros((64, 64, 3), np.uint8))


class Known:
    """A detector that knows what is there, colours included."""

    def __init__(self, *detections):
        self.detections, self.asked = detections, []

    def detect(self, image):
        return self.detections

    def colours(self, image, detections, class_name):
        self.asked.append((class_name, list(detections)))
        return [found.colour for found in detections]


def thing(name='cat', confidence=0.95, box=(0, 0, 10, 10), colour=None):
    return Detection(name, box, confidence, None, colour)


def correct(prompt, *detections):
    return judge(IMAGE, {'prompt': '', **prompt}, Known(*detections)).correct


def wanting(*include, tag='single_object', exclude=()):
    return {'tag': tag, 'include': [{'count': 1, **entry} for entry in include], 'exclude': list(exclude)}


CAT, DOG = {'class': 'cat'}, {'class': 'dog'}


@pytest.mark.parametrize('tag, confidence, expected', [
    ('single_object', 0.3, False), ('single_object', 0.300001, True), ('colors', 0.5, True),
    ('position', 0.5, True), ('counting', 0.9, False), ('counting', 0.89, False),
    ('counting', 0.900001, True)])
def test_confidence_must_exceed_the_threshold_of_the_task(tag, confidence, expected):
    assert correct(wanting(CAT, tag=tag), thing(confidence=confidence)) is expected


def test_all_included_objects_must_be_there():
    assert correct(wanting(CAT, DOG), thing('cat'), thing('dog'))
    assert not correct(wanting(CAT, DOG), thing('cat'), thing('cat'))
    assert not correct(wanting(CAT, DOG))


def test_more_objects_than_asked_for_do_no_harm():
    assert correct(wanting(CAT), thing(), thing(), thing('dog'))


@pytest.mark.parametrize('number, expected', [(1, False), (2, False), (3, True), (4, False), (9, False)])
def test_counting_is_exact(number, expected):
    prompt = wanting({'class': 'cat', 'count': 3}, tag='counting', exclude=[{'class': 'cat', 'count': 4}])
    assert correct(prompt, *[thing() for _ in range(number)]) is expected


def test_counting_does_not_see_objects_below_its_own_threshold():
    prompt = wanting({'class': 'cat', 'count': 2}, tag='counting', exclude=[{'class': 'cat', 'count': 3}])
    assert correct(prompt, thing(), thing(), thing(confidence=0.85))


def test_at_most_sixteen_objects_of_a_class_count():
    many = [thing(confidence=0.5 + i / 100) for i in range(20)]
    kept = keep_confident([*many, thing('dog', 0.4)], 'colors')
    assert kept['cat'] == many[:3:-1]
    assert len(kept['dog']) == 1
    assert not correct(wanting({'class': 'cat', 'count': 17}), *many)
    assert correct(wanting(CAT, exclude=[{'class': 'cat', 'count': 17}]), *many)


def test_of_equal_confidence_the_later_comes_first():
    first, second = thing(box=(0, 0, 1, 1)), thing(box=(0, 0, 2, 2))
    assert keep_confident([first, second], 'colors')['cat'] == [second, first]


def test_colour_is_asked_of_the_most_confident_only():
    prompt = wanting({'class': 'cat', 'color': 'red'}, tag='colors')
    assert correct(prompt, thing(colour='red'))
    assert not correct(prompt, thing(colour='blue'))
    assert not correct(prompt, thing(colour='blue', confidence=0.9), thing(colour='red', confidence=0.8))
    assert correct(prompt, thing(colour='red', confidence=0.9), thing(colour='blue', confidence=0.8))


def test_colours_of_two_objects_must_not_be_swapped():
    prompt = wanting({'class': 'cat', 'color': 'red'}, {'class': 'dog', 'color': 'blue'}, tag='color_attr')
    assert correct(prompt, thing('cat', colour='red'), thing('dog', colour='blue'))
    assert not correct(prompt, thing('cat', colour='blue'), thing('dog', colour='red'))


def test_as_many_as_asked_for_must_have_the_colour():
    prompt = wanting({'class': 'cat', 'count': 2, 'color': 'red'})
    assert correct(prompt, thing(colour='red'), thing(colour='red'))
    assert not correct(prompt, thing(colour='red'), thing(colour='blue'))


def test_colour_is_not_asked_where_objects_are_missing():
    detector = Known()
    verdict = judge(IMAGE, wanting({'class': 'cat', 'color': 'red'}), detector)
    assert verdict.reasons == ('expected 1 cat, found 0',) and detector.asked == []


BESIDE = [(40, 0, 50, 10), (0, 0, 10, 10)]


def test_position_is_that_of_the_second_entry_to_the_first():
    prompt = wanting(DOG, {'class': 'cat', 'position': ['right of', 0]}, tag='position')
    assert correct(prompt, thing('cat', box=BESIDE[0]), thing('dog', box=BESIDE[1]))
    assert not correct(prompt, thing('cat', box=BESIDE[1]), thing('dog', box=BESIDE[0]))


def test_position_fails_where_its_target_does():
    prompt = wanting({**DOG, 'color': 'red'}, {'class': 'cat', 'position': ['right of', 0]})
    cat = thing('cat', box=BESIDE[0])
    verdict = judge(IMAGE, prompt, Known(cat))
    assert verdict.reasons == ('expected 1 dog, found 0', 'nothing for cat to be right of')
    assert not correct(prompt, cat, thing('dog', box=BESIDE[1], colour='blue'))
    assert correct(prompt, cat, thing('dog', box=BESIDE[1], colour='red'))


def test_every_pair_must_stand_so():
    prompt = wanting({**DOG, 'count': 2}, {'class': 'cat', 'position': ['right of', 0]})
    cat = thing('cat', box=(40, 0, 50, 10))
    assert correct(prompt, cat, thing('dog', box=(0, 0, 10, 10)), thing('dog', box=(10, 0, 20, 10)))
    for first, second in ((0, 50), (50, 0)):
        assert not correct(prompt, cat,
                           *[thing('dog', box=(left, 0, left + 10, 10)) for left in (first, second)])


def test_position_looks_at_the_most_confident_only():
    prompt = wanting(DOG, {'class': 'cat', 'position': ['right of', 0]})
    dogs = thing('dog', 0.8, BESIDE[1]), thing('dog', 0.6, (60, 0, 64, 10))
    assert correct(prompt, thing('cat', box=BESIDE[0]), *dogs)


def box_at(x, y, size=10):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize('x, y, expected', [
    (30, 0, {'right of'}), (-30, 0, {'left of'}), (0, 30, {'below'}), (0, -30, {'above'}),
    (30, 30, {'right of', 'below'}), (-30, -30, {'left of', 'above'}),
    (0, 0, set()),
    # the margin: 0.1 of 10 + 10 pixels, and a thousandth of a pixel
    (2, 0, set()), (2.0005, 0, set()),
    (2.1, 0, set()),                            # beyond it by 0.1 of 2.1: too little of the whole offset
    (3.9, 0, set()), (4.1, 0, {'right of'}),    # (x - 2) / x passes one half at 4
    (20, 12, {'right of'}), (20, 14, {'right of'}), (30, 18, {'right of'}), (30, 20.5, {'right of', 'below'}),
])
def test_relations_leave_a_margin_and_follow_the_offset(x, y, expected):
    assert relations(box_at(x, y), box_at(0, 0)) == expected


def test_next_to_no_offset_is_none_even_of_points():
    assert relations(box_at(0.0009, 0, size=0), box_at(0, 0, size=0)) == set()
    assert relations(box_at(0.0011, 0, size=0), box_at(0, 0, size=0)) == {'right of'}


def test_the_margin_grows_with_each_side_of_the_boxes():
    wide, tall = (-50, -5, 50, 5), (-5, -50, 5, 50)
    assert relations(box_at(20, 0), wide) == set()            # 0.1 · (10 + 100) of 20: 9 of 20 are left
    assert relations(box_at(20, 0), tall) == {'right of'}


@given(boxes=st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 30)] * 2), min_size=2,
                      max_size=2))
def test_relations_turn_round_with_the_roles(boxes):
    a, b = ((x, y, x + w, y + h) for x, y, w, h in boxes)
    opposite = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
    assert {opposite[name] for name in relations(a, b)} == relations(b, a)
    assert len(relations(a, b) & {'left of', 'right of'}) < 2


def results(**tasks):
    """task=[[correct of each image] of each prompt]."""
    return [{'task': task, 'prompt': f'{task} {number}', 'correct': bool(value)}
            for task, prompts in tasks.items() for number, values in enumerate(prompts) for value in values]


def test_overall_is_the_mean_of_the_tasks_not_of_the_images():
    summary = summarise(results(counting=[[0, 0], [0, 0], [0, 0]], single_object=[[1, 1]]))
    assert summary['overall'] == 0.5
    assert summary['correct_pictures'] == 0.25
    assert summary['tasks'] == {'single_object': 1.0, 'counting': 0.0}
    assert list(summary['tasks']) == ['single_object', 'counting']
    assert (summary['pictures'], summary['prompts']) == (8, 4)


def test_a_prompt_is_correct_with_one_of_its_images():
    summary = summarise(results(colors=[[0, 1, 0, 0], [0, 0, 0, 0]]))
    assert summary['correct_prompts'] == 0.5
    assert summary['overall'] == 0.125
