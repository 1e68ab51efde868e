"""Cut out objects, detections from a file, and the optional network with stand-ins for its packages."""
import json
import sys
import types

import numpy as np
import pytest

from lit_jax.metrics.geneval.detector import Detection, Pixels, StoredDetections, cut_out, detection_line
from lit_jax.metrics.geneval.geneval_prompts import CLASSES, COLOURS
from lit_jax.metrics.geneval.mask2former import Mask2Former
from lit_jax.runtime.errors import UserError

GREY = 0x99
IMAGE = Pixels('00000/samples/0000.png', np.full((8, 12, 3), (255, 0, 0), np.uint8))


def test_cut_out_is_the_box_with_grey_outside_the_mask():
    image = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    mask = np.zeros((8, 12), bool)
    mask[3:5, 4:6] = True
    crop = cut_out(image, Detection('cat', (2.4, 1.6, 8.5, 6.1), 1.0, mask))
    expected = np.full((8, 12, 3), GREY, np.uint8)
    expected[mask] = image[mask]
    np.testing.assert_array_equal(crop, expected[2:6, 2:8])         # 8.5 rounds to the even number


def test_cut_out_without_a_mask_is_the_box():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    np.testing.assert_array_equal(cut_out(image, Detection('cat', (1, 2, 5, 7))), image[2:7, 1:5])


def test_cut_out_of_an_empty_box_has_one_pixel():
    assert cut_out(IMAGE.image, Detection('cat', (3.1, 3.1, 3.2, 3.3))).shape == (1, 1, 3)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(UserError, match=r'mask of a cat has shape \(4, 4\), its image \(8, 12\)'):
        cut_out(IMAGE.image, Detection('cat', (0, 0, 4, 4), 1.0, np.zeros((4, 4), bool)))


def test_stored_detections_come_back(tmp_path):
    found = [Detection('cat', (0.5, 1.0, 2.0, 3.0), 0.75, None, 'red'),
             Detection('dog', (0.0, 0.0, 1.0, 1.0), 0.5)]
    path = tmp_path / 'found.jsonl'
    path.write_text(detection_line(IMAGE.name, found) + '\n' + detection_line('00001/samples/0000.png', []))
    stored = StoredDetections(path)
    assert stored.detect(IMAGE) == found
    assert stored.detect(Pixels('00001/samples/0000.png', IMAGE.image)) == []
    assert stored.colours(IMAGE, found[:1], 'cat') == ['red']
    with pytest.raises(UserError, match='lacks the colour of a dog'):
        stored.colours(IMAGE, found[1:], 'dog')
    with pytest.raises(UserError, match='no detections of 00002/samples/0000.png'):
        stored.detect(Pixels('00002/samples/0000.png', IMAGE.image))


@pytest.mark.parametrize('line',
                         ['nonsense', '[]', '{"image": "a"}',
                          '{"image": "a", "detections": [{"class": "cat"}]}',
                          '{"image": "a", "detections": [{"class": "cat", "box": [1, 2, 3]}]}',
                          '{"image": "a", "detections": [{"class": "cat", "box": [1, 2, 3, NaN]}]}'])
def test_lines_that_are_no_detections_are_refused(tmp_path, line):
    path = tmp_path / 'found.jsonl'
    path.write_text(json.dumps({'image': 'b', 'detections': []}) + '\n' + line + '\n')
    with pytest.raises(UserError, match='line 2 is not a line of detections'):
        StoredDetections(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match='found.jsonl does not exist'):
        StoredDetections(tmp_path / 'found.jsonl')


@pytest.fixture
def network_files(tmp_path):
    for name in ('config.py', 'weights.pth'):
        (tmp_path / name).write_bytes(b'')
    return str(tmp_path / 'config.py'), str(tmp_path / 'weights.pth')


def test_the_network_names_what_is_not_installed(network_files, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    with pytest.raises(UserError, match='needs mmdet.*extra geneval'):
        Mask2Former(*network_files)


def test_the_network_needs_its_files(network_files):
    with pytest.raises(UserError, match='gone.pth does not exist; give the checkpoint'):
        Mask2Former(network_files[0], 'gone.pth')


RGB = {'red': (255, 0, 0), 'orange': (255, 165, 0), 'yellow': (255, 255, 0), 'green': (0, 255, 0),
       'blue': (0, 0, 255), 'purple': (128, 0, 128), 'pink': (255, 192, 203), 'brown': (120, 60, 20),
       'black': (1, 1, 2), 'white': (255, 255, 255)}


def stand_ins(torch, detections):
    """Modules with what is called of mmdet.apis and open_clip: a CLIP whose features are the mean colour."""
    class Clip:
        def eval(self):
            return self

        def encode_image(self, images):
            return images.mean(dim=(1, 2))

        def encode_text(self, tokens):
            return torch.tensor([RGB[COLOURS[int(i)]] for i in tokens], dtype=torch.float32)

    def tokenize(texts):
        assert [text.split()[-1] for text in texts] == ['cat', 'cat', 'object']
        words = [text.split()[4].removesuffix('-colored') for text in texts]
        return torch.tensor([COLOURS.index(word) for word in words])

    apis = types.ModuleType('mmdet.apis')
    apis.init_detector = lambda config, checkpoint, device: device
    apis.inference_detector = lambda network, image: detections(image)
    mmdet = types.ModuleType('mmdet')
    mmdet.apis = apis
    clip = types.ModuleType('open_clip')
    clip.create_model_and_transforms = lambda name, pretrained, device: (
        Clip(), None, lambda image: torch.from_numpy(np.array(image)).float())
    clip.get_tokenizer = lambda name: tokenize
    return {'mmdet': mmdet, 'mmdet.apis': apis, 'open_clip': clip}


@pytest.fixture
def network(network_files, monkeypatch):
    import torch

    def make(detections):
        for name, module in stand_ins(torch, detections).items():
            monkeypatch.setitem(sys.modules, name, module)
        return Mask2Former(*network_files, device='cpu')
    return make


@pytest.mark.peers
def test_the_network_gives_every_class_its_boxes_masks_and_colours(network):
    """With stand-ins for its packages: the real ones are not run by the tests."""
    seen = []

    def detections(image):
        seen.append(image)
        boxes = [np.zeros((0, 5), np.float32) for _ in CLASSES]
        boxes[CLASSES.index('cat')] = np.float32([[0, 0, 4, 4, 0.9], [4, 0, 8, 4, 0.5]])
        masks = [[np.ones((8, 12), bool)] * len(of_class) for of_class in boxes]
        return boxes, masks

    image = IMAGE.image.copy()
    image[:, 4:] = (0, 0, 255)
    detector, pixels = network(detections), Pixels('p', image)
    found = detector.detect(pixels)
    np.testing.assert_array_equal(seen[0], image[..., ::-1])
    assert [(one.class_name, one.box, round(one.confidence, 6)) for one in found] == [
        ('cat', (0, 0, 4, 4), 0.9), ('cat', (4, 0, 8, 4), 0.5)]
    assert detector.colours(pixels, found, 'cat') == ['red', 'blue']


@pytest.mark.peers
@pytest.mark.parametrize('result, text',
                         [(([np.zeros((0, 5))] * 3, [[]] * 3), 'has 3 classes, expected the 80 of COCO'),
                          (object(), 'as MMDetection 2.x does')])
def test_another_network_is_refused(network, result, text):
    with pytest.raises(UserError, match=text):
        network(lambda image: result).detect(IMAGE)
