"""The detector of shapes: exact on what was drawn, steady under noise and blur, and strict with what is no
shape."""
import numpy as np
import pytest
from scipy import ndimage

from lit_jax.data.toys.shapes import BACKGROUND, PALETTE, Shape, ShapesSource, render
from lit_jax.metrics.geneval.detector import Pixels
from lit_jax.metrics.toys.shapes_detector import UNKNOWN, ShapesDetector, nearest_colour
from lit_jax.report.grids import to_uint8

DETECTOR = ShapesDetector()
Y, X = (np.mgrid[:256, :256] + 0.5) / 8       # eight points a pixel and axis of an image of 32


def detect(image):
    return DETECTOR.detect(Pixels('test', image))


def confident(image, least=0.9):
    """The objects above a confidence, with their boxes, sorted."""
    return sorted((one.class_name, one.colour, one.box) for one in detect(image) if one.confidence > least)


def truth(scene):
    return sorted((shape.name, shape.colour, shape.box) for shape in scene.shapes)


def paint(inside, colour='blue'):
    """An image of a region, bool [256, 256], with soft edges."""
    amount = inside.reshape(32, 8, 32, 8).mean(axis=(1, 3))[..., None]
    return np.round(np.array(BACKGROUND) * (1 - amount) + np.array(PALETTE[colour]) * amount).astype(np.uint8)


@pytest.mark.parametrize('start', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (500, 1000, 1500))])
def test_exact_on_all_rendered_scenes(start):
    source = ShapesSource(split='held_out')
    for index in range(start, start + 500):
        scene = source.scene(index)
        assert confident(to_uint8(render(scene.shapes))) == truth(scene), index


def test_exact_on_larger_images():
    source = ShapesSource(split='held_out', image_size=64)
    for index in range(40):
        scene = source.scene(index)
        assert confident(to_uint8(render(scene.shapes, 64))) == truth(scene), index


@pytest.mark.parametrize('size', [18, 20, 24])
def test_exact_on_small_images(size):
    """On 18 pixels, those of the demo, a shape is five pixels wide."""
    source = ShapesSource(split='held_out', image_size=size)
    for index in range(200):
        scene = source.scene(index)
        found = sorted((one.class_name, one.colour) for one in detect(to_uint8(render(scene.shapes, size)))
                       if one.confidence > 0.9)
        assert found == sorted((shape.name, shape.colour) for shape in scene.shapes), index


@pytest.mark.parametrize('noise, blur, least',
                         [(0.05, 0, 0.98), (0.1, 0, 0.98), (0, 0.5, 0.98), (0.05, 0.5, 0.98),
                          (0.1, 0.5, 0.98), (0.05, 0.7, 0.98), (0.1, 0.7, 0.92)])
def test_steady_under_noise_and_blur(noise, blur, least):
    """What is lost under most of both are triangles, whose tips thin out."""
    source, rng = ShapesSource(split='held_out'), np.random.default_rng(0)
    right = 0
    for index in range(250):
        scene = source.scene(index)
        image = ndimage.gaussian_filter(render(scene.shapes),
                                        (blur, blur, 0)) + noise * rng.standard_normal((32, 32, 3))
        right += confident(to_uint8(image)) == truth(scene)
    assert right >= least * 250


def test_masks_and_colours_belong_to_the_objects():
    shapes = Shape('circle', 'orange', 3, 4, 9), Shape('triangle', 'purple', 18, 15, 12)
    image = to_uint8(render(shapes))
    circle, triangle = sorted(detect(image), key=lambda one: one.class_name)
    assert circle.mask.shape == (32, 32) and circle.mask[8, 7] and not circle.mask[4, 3]
    assert not (circle.mask & triangle.mask).any()
    assert DETECTOR.colours(Pixels('test', image), [circle, triangle], 'circle') == ['orange', 'purple']


@pytest.mark.parametrize('name', PALETTE)
def test_colours_have_room_around_them(name):
    assert nearest_colour(PALETTE[name]) == name
    assert all(nearest_colour(np.clip(np.add(PALETTE[name], step), 0, 255)) == name for step in 25 * np.array(
        [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)]))
    assert nearest_colour(BACKGROUND) == nearest_colour((0, 0, 0)) == UNKNOWN


def test_a_shape_of_another_colour_is_a_shape_of_unknown_colour():
    image = to_uint8(render([Shape('square', 'red', 8, 8, 10)]))
    image[(image != BACKGROUND).any(axis=-1)] = (20, 20, 20)
    assert [(one.class_name, one.colour) for one in detect(image)] == [('square', UNKNOWN)]


@pytest.mark.parametrize('image', [np.full((32, 32, 3), value, np.uint8) for value in (0, 200, 255)]
                         + [np.full((32, 32, 3), PALETTE['red'], np.uint8)])
def test_nothing_is_found_in_plain_images(image):
    assert detect(image) == []


def test_nothing_is_found_in_noise():
    rng = np.random.default_rng(0)
    for smooth in (0, 0.7, 1.5, 3):
        for _ in range(40):
            noise = ndimage.gaussian_filter(rng.standard_normal((32, 32, 3)), (smooth, smooth, 0))
            assert confident(to_uint8(0.6 * noise / noise.std()), 0.3) == []


def outlines(x, y, r):
    """Name -> what is no circle, square or triangle, of about r pixels around a centre that is at 0."""
    square = (abs(x) <= r) & (abs(y) <= r)
    circle = x * x + y * y <= r * r
    return {'ellipse': x * x / 1.5 + y * y * 1.5 <= r * r, 'bar': (abs(x) <= r) & (abs(y) <= r / 2),
            'corner': square & ~((x > 0) & (y > 0)),
            'half circle': circle & (x > -0.3 * r), 'ring': circle & (x * x + y * y > 0.2 * r * r),
            'upside down': (abs(y) <= r) & (abs(x) <= (r - y) / 2),
            'two circles': circle | ((x - r) ** 2 + (y - r / 2) ** 2 <= r * r),
            'cross': square & ((abs(x) < r / 3) | (abs(y) < r / 3)),
            'trapezium': (abs(y) <= r) & (abs(x) <= (3 * r + y) / 4)}


@pytest.mark.parametrize('name', outlines(X, Y, 5))
def test_other_outlines_are_no_shapes(name):
    rng = np.random.default_rng(0)
    for _ in range(25):
        x, y = rng.uniform(10, 20, 2)
        image = paint(outlines(X - x, Y - y, rng.uniform(4, 6.5))[name])
        assert (image != BACKGROUND).any() and confident(image, 0.3) == []


def test_blobs_are_no_shapes():
    rng, found = np.random.default_rng(0), 0
    for _ in range(100):
        field = ndimage.gaussian_filter(rng.standard_normal((256, 256)), 16)
        x, y = rng.uniform(10, 20, 2)
        found += len(confident(paint(field / field.std() - ((X - x) ** 2 + (Y - y) ** 2) / 50 > 0), 0.3))
    assert found <= 3


def test_objects_that_run_into_each_other_are_none():
    rng, found = np.random.default_rng(0), 0
    for _ in range(150):
        names, colours = rng.choice(['circle', 'square', 'triangle'], 2), rng.choice(list(PALETTE), 2)
        second = Shape(names[1], colours[1], 6 + int(rng.integers(3, 8)), 8 + int(rng.integers(-2, 3)), 9)
        found += len(confident(to_uint8(render([Shape(names[0], colours[0], 6, 8, 9), second])), 0.3))
    assert found <= 3


def test_an_object_of_two_colours_is_none():
    image = to_uint8(render([Shape('square', 'red', 8, 8, 12)]))
    image[8:20, 14:20] = PALETTE['blue']
    assert detect(image) == []


def test_specks_are_no_objects_and_do_no_harm():
    image = to_uint8(render([Shape('circle', 'green', 12, 12, 9)]))
    image[3:5, 3:5], image[28, 28] = PALETTE['red'], PALETTE['blue']
    assert [(one.class_name, one.colour) for one in detect(image)] == [('circle', 'green')]
