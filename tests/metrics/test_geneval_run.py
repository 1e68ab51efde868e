"""A folder of images scored from end to end, and folders that are none."""
import json

import numpy as np
import pytest
from PIL import Image

from lit_jax.metrics.geneval.detector import Detection, StoredDetections
from lit_jax.metrics.geneval.geneval_folder import read_images, score_folder, store_detections
from lit_jax.metrics.geneval.geneval_prompts import TASKS, make_prompts
from lit_jax.runtime.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)
FIRST = {task: next(p for p in make_prompts() if p['tag'] == task) for task in TASKS}


class Painted:
    """Knows the images of this test: the left half is object 0 of the prompt, the right half object 1, black
    is nothing.

    For a real detector the classes and colours would be found; here they come from the prompt."""

    def __init__(self, folder):
        self.folder = folder

    def _wanted(self, image):
        return json.loads((self.folder / image.name[:5] / 'metadata.jsonl').read_text())['include']

    def detect(self, image):
        half = image.image.shape[1] // 2
        boxes = [(0, 0, half, 8), (half, 0, 2 * half, 8)]
        return [Detection(wanted['class'], box, 0.95)
                for wanted, box in zip(self._wanted(image), boxes, strict=False)
                if image.image[4, int(box[0]) + 1].any()]

    def colours(self, image, detections, class_name):
        asked = next(wanted['color'] for wanted in self._wanted(image) if wanted['class'] == class_name)
        return [asked if tuple(image.image[4, int(one.box[0]) + 1]) == RED else 'none' for one in detections]


def paint(folder, number, prompt, *images):
    """Each image: the colours of its left and right half."""
    samples = folder / f'{number:05d}' / 'samples'
    samples.mkdir(parents=True)
    (folder / f'{number:05d}' / 'metadata.jsonl').write_text(json.dumps(prompt))
    for index, halves in enumerate(images):
        image = np.zeros((8, 16, 3), np.uint8)
        image[:, :8], image[:, 8:] = halves
        Image.fromarray(image).save(samples / f'{index:04d}.png')


@pytest.fixture
def folder(tmp_path):
    """Two tasks: single_object right in 2 of 4 images, color_attr in 1 of 4."""
    paint(tmp_path, 0, FIRST['single_object'], (RED, 0), (BLUE, 0), (0, 0), (0, RED))
    paint(tmp_path, 9, FIRST['color_attr'], (RED, RED), (RED, BLUE), (RED, 0), (0, RED))
    (tmp_path / 'readme.txt').write_text('not a prompt')
    (tmp_path / '00009' / 'samples' / 'grid.png').write_bytes(b'not a sample')
    return tmp_path


def test_a_folder_is_scored(folder):
    calls = []
    scores = score_folder(folder, Painted(folder), progress=lambda *done: calls.append(done))
    assert scores['tasks'] == {'single_object': 0.5, 'color_attr': 0.25}
    assert scores['overall'] == 0.375
    assert scores['correct_prompts'] == 1.0
    assert (scores['pictures'], scores['prompts']) == (8, 2)
    assert calls == [(1, 2), (2, 2)]
    wrong = [result for result in scores['results'] if not result['correct']]
    assert wrong[0]['image'] == '00000/samples/0002.png' and wrong[0]['reasons'][0].startswith('expected 1 ')
    assert json.loads(json.dumps(scores)) == scores


def test_what_differs_from_the_published_protocol_is_noted(folder):
    other = {**FIRST['colors'], 'prompt': 'a photograph in which a lovely thing can be seen'}
    paint(folder, 11, other, (RED, 0))
    notes = score_folder(folder, Painted(folder))['notes']
    assert notes == ['3 prompts, GenEval has 553', '1 prompts are not those of GenEval',
                     '1 to 4 images of a prompt, published numbers have 4',
                     'no images of the tasks two_object, counting, position: overall is the mean of the '
                     'others']


def test_stored_detections_score_the_same(folder, tmp_path):
    expected = score_folder(folder, Painted(folder))
    assert store_detections(folder, Painted(folder), tmp_path / 'found.jsonl') == 8
    assert score_folder(folder, StoredDetections(tmp_path / 'found.jsonl')) == expected


def test_images_come_by_number_as_rgb(tmp_path):
    samples = tmp_path / '00000' / 'samples'
    samples.mkdir(parents=True)
    for name, value in (('0010.png', 3), ('2.png', 2), ('0001.png', 1)):
        Image.new('L', (4, 6), value).save(samples / name)
    images = list(read_images(tmp_path, '00000'))
    assert [image.image[0, 0, 0] for image in images] == [1, 2, 3]
    assert images[0].image.shape == (6, 4, 3) and images[1].name == '00000/samples/2.png'


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match='is not a folder'):
        score_folder(tmp_path / 'gone', Painted(tmp_path))
    with pytest.raises(UserError, match='has no folders 00000'):
        score_folder(tmp_path, Painted(tmp_path))
    paint(tmp_path, 0, FIRST['colors'])
    with pytest.raises(UserError, match='has 1 prompts and no image; put images into '
                                        '00000/samples/0000.png'):
        score_folder(tmp_path, Painted(tmp_path))


@pytest.mark.parametrize('text',
                         ['', '{}', '[1]', '{"tag": "colors", "prompt": "", "include": [{"class": "cat"}]}',
                          '{"tag": "position", "prompt": "", "include": [{"class": "cat", "count": 1, '
                          '"position": ["above", 0]}]}'])
def test_descriptions_that_are_none_are_refused(tmp_path, text):
    paint(tmp_path, 0, FIRST['colors'], (RED, 0))
    (tmp_path / '00000' / 'metadata.jsonl').write_text(text)
    with pytest.raises(UserError, match='metadata.jsonl is not the description of a prompt'):
        score_folder(tmp_path, Painted(tmp_path))


def test_a_damaged_image_is_named(tmp_path):
    paint(tmp_path, 0, FIRST['colors'], (RED, 0))
    (tmp_path / '00000' / 'samples' / '0000.png').write_bytes(b'nothing')
    with pytest.raises(UserError, match='samples/0000.png is not a readable image'):
        score_folder(tmp_path, Painted(tmp_path))
