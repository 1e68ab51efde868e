"""Rendered shapes: captions are true of the images, objects keep their distance, and examples never
change."""
import time

import numpy as np
import pytest

from lit_jax.data.base import random_generator
from lit_jax.data.captions import Captioned
from lit_jax.data.toys.shapes import (
    BACKGROUND,
    KINDS,
    PALETTE,
    PLACES,
    SMALLEST_IMAGE,
    Shape,
    ShapesSource,
    clear_relation,
    coverage,
    draw_scene,
    render,
)
from lit_jax.data.toys.shapes_words import (
    CLASSES,
    COLOURS,
    NUMBERS,
    RELATIONS,
    VOCABULARY,
    all_captions,
    make_tokenizer,
    phrase,
)
from lit_jax.metrics.geneval.rules import relations
from lit_jax.runtime.errors import UserError
from lit_jax.text.tokenizer import Tokenizer

SCENES = [ShapesSource().scene(index) for index in range(1200)]


def read_caption(caption):
    """([(class, colour or '', count)], relation or ''): a parser of its own, so that it can disagree."""
    relation = next((relation for relation in RELATIONS if f' {relation} ' in caption), '')
    objects = []
    for part in caption.split(f' {relation or "and"} '):
        words = part.split()
        count = {'a': 1, 'an': 1, **{word: number for number, word in NUMBERS.items()}}[words[0]]
        name = words[-1].removesuffix('s') if count > 1 else words[-1]
        assert name in CLASSES and len(words) in (2, 3) and set(words[1:-1]) <= set(COLOURS)
        objects.append((name, words[1] if len(words) == 3 else '', count))
    return objects, relation


def is_true(caption, shapes):
    """Whether everything the caption says is so, and nothing is left over."""
    objects, relation = read_caption(caption)
    shapes = list(shapes)
    for name, colour, count in objects:
        if [s.name for s in shapes].count(name) != count or any(colour not in ('', s.colour) for s in shapes
                                                                if s.name == name):
            return False
    if relation:
        first, second = ([s for s in shapes if s.name == one[0]][0] for one in objects)
        if relation not in relations(first.box, second.box):
            return False
    return len(shapes) == sum(count for _, _, count in objects)


def test_every_caption_is_true_of_its_image():
    for scene in SCENES:
        assert 1 <= len(scene.captions) <= 2 and all(is_true(caption, scene.shapes)
                                                     for caption in scene.captions), scene


def test_the_checker_of_captions_sees_what_is_wrong():
    scene = next(s for s in SCENES if s.kind == 'position' and s.captions[0].count('left of'))
    assert is_true(scene.captions[0], scene.shapes)
    assert not is_true(scene.captions[0].replace('left of', 'above'), scene.shapes)
    assert not is_true(scene.captions[0], scene.shapes[:1]) and not is_true('two circles', scene.shapes)


def test_the_first_caption_says_what_its_kind_is_about():
    for scene in SCENES:
        objects, relation = read_caption(scene.captions[0])
        assert len(objects) == (2 if scene.kind in ('two_object', 'position', 'color_attr') else 1)
        assert (objects[0][2] > 1) == (scene.kind
                                       == 'counting') and bool(relation) == (scene.kind == 'position')
        assert all(bool(colour) == (scene.kind in ('colors', 'color_attr')) for _, colour, _ in objects)


def test_kinds_classes_colours_and_relations_are_all_about_as_frequent():
    for number, words in ((200, [s.kind for s in SCENES]),
                          (700, [shape.name for s in SCENES for shape in s.shapes]),
                          (350, [shape.colour for s in SCENES for shape in s.shapes]),
                          (50, [read_caption(s.captions[0])[1] for s in SCENES if s.kind == 'position'])):
        counts = np.unique(words, return_counts=True)[1]
        assert 0.6 * number < counts.min() and counts.max() < 1.5 * number
    assert {s.kind for s in SCENES} == set(KINDS)


@pytest.mark.parametrize('size', [18, 20, 24, 32, 64])
def test_objects_stand_in_places_of_their_own_and_do_not_touch(size):
    side, source = size // PLACES, ShapesSource(image_size=size)
    margin = (size - PLACES * side) // 2
    for scene in (source.scene(index) for index in range(300)):
        drawn, places = np.zeros((size + 1, size + 1), int), set()
        for shape in scene.shapes:
            left, top, right, bottom = shape.box
            assert 0.75 * side <= shape.size < side and 0 <= left and 0 <= top and right <= size \
                and bottom <= size
            places.add(((left - margin) // side, (top - margin) // side))
            assert ((right - 1 - margin) // side, (bottom - 1 - margin) // side) in places
            drawn[top:bottom + 1, left:right + 1] += 1      # grown by a pixel they still may not meet
        assert drawn.max() == 1 and len(places) == len(scene.shapes)


def test_every_place_is_used_about_as_often():
    counts = np.unique([(shape.left // 10, shape.top // 10) for scene in SCENES for shape in scene.shapes],
                       axis=0, return_counts=True)[1]
    assert len(counts) == PLACES ** 2 and counts.min() > 0.75 * counts.mean() \
        and counts.max() < 1.25 * counts.mean()


def test_the_vocabulary_and_the_list_of_captions_are_closed():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 1158
    assert {word for caption in captions for word in caption.split()} == set(VOCABULARY)
    assert {caption for scene in SCENES for caption in scene.captions} <= set(captions)
    assert 'an orange circle above a red square' in captions and 'a orange circle' not in captions
    assert phrase('square', 'orange', 3) == 'three orange squares'


def test_a_relation_is_named_only_where_it_is_clear():
    names = [clear_relation(*scene.shapes) for scene in SCENES if scene.kind == 'two_object']
    assert set(names) == {'', *RELATIONS}
    for scene in SCENES:
        if scene.kind == 'position':
            assert clear_relation(*scene.shapes) in scene.captions[0]
            assert clear_relation(*scene.shapes[::-1]) != clear_relation(*scene.shapes)


@pytest.mark.parametrize('name, share', [('circle', np.pi / 4), ('square', 1), ('triangle', 0.5)])
def test_shapes_cover_the_area_they_have(name, share):
    for side in (7, 13, 40):
        assert coverage(name, side, side).mean() == pytest.approx(share, abs=2e-3)
        assert coverage(name, side, side).max() == 1
        np.testing.assert_array_equal(coverage(name, side, side), coverage(name, side, side)[:, ::-1])


def test_a_image_has_the_background_and_the_colours_of_its_objects():
    for scene in SCENES[:50]:
        image = render(scene.shapes)
        assert image.shape == (32, 32, 3) and image.dtype == np.float32 and np.abs(image).max() <= 1
        np.testing.assert_allclose(image[0], np.full((32, 3), BACKGROUND[0]) / 127.5 - 1, atol=1e-6)
        for shape in scene.shapes:
            # Not the very middle of a triangle's box: its lower half is covered there.
            pixel = image[shape.top + 2 * shape.size // 3, shape.left + shape.size // 2]
            np.testing.assert_allclose((pixel + 1) * 127.5, PALETTE[shape.colour], atol=1e-3)


def test_the_same_number_gives_the_same_example_and_splits_differ():
    source, other = ShapesSource(seed=1), ShapesSource(seed=1)
    images = source.take_images([7, 2, 7])
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], other[2]['image'])
    np.testing.assert_array_equal(source.take([7])['image'], images[:1])
    assert source[7]['captions'] == other.captions(7) == other.scene(7).captions
    for different in (ShapesSource(seed=1, split='held_out'), ShapesSource(seed=2)):
        assert [different.scene(i) for i in range(5)] != [source.scene(i) for i in range(5)]


def test_the_first_examples_have_not_changed():
    """A record of the generator: shipped weights were trained on these images."""
    source = ShapesSource()
    assert [source.captions(i) for i in range(3)] == RECORD
    assert source.scene(1).shapes[0] == Shape('triangle', 'blue', 2, 2, 8)


RECORD = [('a blue square',), ('a triangle above a square', 'a blue triangle above a red square'),
          ('a blue square and a purple circle',)]


def test_lengths_and_what_is_refused():
    assert (len(ShapesSource()), len(ShapesSource(split='held_out')),
            len(ShapesSource(length=5))) == (50_000, 2_000, 5)
    assert ShapesSource().spec.image_shape == (32, 32, 3) and ShapesSource().class_names == []
    for index in (-1, 5):
        with pytest.raises(IndexError):
            ShapesSource(length=5)[index]
    with pytest.raises(ValueError, match='split'):
        ShapesSource(split='test')
    with pytest.raises(ValueError, match=f'need {SMALLEST_IMAGE}'):
        ShapesSource(image_size=16)
    with pytest.raises(UserError, match='no labels'):
        ShapesSource().all_labels()
    assert ShapesSource(seed=3).identity == {'name': 'shapes', 'split': 'train', 'seed': 3, 'image_size': 32,
                                             'count': 50_000}


def test_captioned_examples_hold_the_tokens_of_both_captions(tmp_path):
    pytest.importorskip('tokenizers')
    make_tokenizer(tmp_path)
    tokenizer, source = Tokenizer.load(tmp_path), ShapesSource()
    element = Captioned(source, tokenizer, 12)[1]
    np.testing.assert_array_equal(element['tokens'], tokenizer.encode(source.captions(1)[::-1], 12).ids)
    np.testing.assert_array_equal(element['image'], source[1]['image'])


def test_larger_images_show_larger_shapes():
    scene = draw_scene(random_generator(0, 'shapes train', 0), 'counting', 96)
    image = render(scene.shapes, 96)
    assert image.shape == (96, 96, 3) and all(24 <= shape.size <= 28 for shape in scene.shapes)
    assert is_true(scene.captions[0], scene.shapes)


def test_drawing_is_quick():
    """64 images in a tenth of a training step, 7 ms here; the bound is wide for slow machines."""
    source = ShapesSource()
    source.take_images(range(1000))
    start = time.perf_counter()
    source.take_images(range(640))
    assert time.perf_counter() - start < 10 * 0.06


def test_the_tokenizer_has_one_token_a_word(tmp_path):
    pytest.importorskip('tokenizers')
    make_tokenizer(tmp_path / 'new')
    tokenizer = Tokenizer.load(tmp_path / 'new')
    assert tokenizer.size == len(VOCABULARY) + 3
    tokens = tokenizer.encode([*all_captions(), '', 'A red Circle, left of two dogs'], 12)
    assert tokens.truncated == [] and (tokens.ids[-2] == [1, *[0] * 11]).all()
    words = [[VOCABULARY[i - 3] for i in row if i > 2] for row in tokens.ids.tolist()]
    assert [' '.join(row) for row in words[:-2]] == list(all_captions())
    assert (tokens.ids[:-2] != 2).all() and (tokens.mask.sum(axis=1)[:-2]
                                             == [len(row) + 1 for row in words[:-2]]).all()
    assert words[-1] == ['a', 'red', 'circle', 'left', 'of', 'two'] and tokens.ids[-1].tolist().count(2) == 2


def test_the_file_of_the_tokenizer_ends_captions_itself(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer.from_file(make_tokenizer(tmp_path))
    assert tokenizer.encode('a red circle').tokens == ['a', 'red', 'circle', '</s>']


def test_a_missing_tokenizers_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
    with pytest.raises(UserError, match='tokenizers'):
        make_tokenizer(tmp_path)
