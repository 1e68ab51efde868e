"""The detector of the published GenEval numbers: Mask2Former and CLIP, in PyTorch (optional).

Its packages (the extra geneval) are old and need an environment of their own: run `store_detections` there,
and score the stored detections anywhere.

Detector: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco of MMDetection 2.x, with its config and its checkpoint
of that version. With a checkpoint of 3.x most weights stay random and scores are near 0, without an error.
Colours: CLIP ViT-L-14 of OpenAI, three sentences per colour, their features averaged."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lit_jax.metrics.geneval.detector import Detection, Pixels, cut_out
from lit_jax.metrics.geneval.geneval_prompts import CLASSES, COLOURS
from lit_jax.runtime.errors import UserError

CLIP, CLIP_WEIGHTS = 'ViT-L-14', 'openai'
SENTENCES = ('a photo of a {colour} {name}', 'a photo of a {colour}-colored {name}',
             'a photo of a {colour} object')


class Mask2Former:
    """A `Detector`. config: the network's .py file; checkpoint: its .pth file; device: torch's name."""

    def __init__(self, config: str, checkpoint: str, device: str = 'cuda'):
        for path, what in ((config, 'config of the network (.py)'), (checkpoint, 'checkpoint (.pth)')):
            if not Path(path).is_file():
                raise UserError(f'{path} does not exist; give the {what} of MMDetection 2.x')
        self._torch, mmdet_apis, open_clip = _imports()
        self._detect = mmdet_apis.inference_detector
        self._detector = mmdet_apis.init_detector(config, checkpoint, device=device)
        self._clip, _, self._transform = open_clip.create_model_and_transforms(CLIP, pretrained=CLIP_WEIGHTS,
                                                                               device=device)
        self._clip.eval()
        self._tokenize, self._device = open_clip.get_tokenizer(CLIP), device
        self._colour_features = {}

    def detect(self, image: Pixels) -> list[Detection]:
        found = self._detect(self._detector, np.ascontiguousarray(image.image[..., ::-1]))     # BGR
        if not isinstance(found, tuple):
            raise UserError('the detector returned no (boxes, masks), as MMDetection 2.x does; install that '
                            'version, and the config and the checkpoint that belong to it')
        boxes, masks = found
        if len(boxes) != len(CLASSES):
            raise UserError(f'the detector has {len(boxes)} classes, expected the {len(CLASSES)} of COCO; '
                            'give mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco')
        return [Detection(name, tuple(float(x) for x in box[:4]), float(box[4]), np.asarray(mask, bool))
                for name, of_class, masks_of_class in zip(CLASSES, boxes, masks, strict=True)
                for box, mask in zip(of_class, masks_of_class, strict=True)]

    def colours(self, image: Pixels, detections: Sequence[Detection], class_name: str) -> list[str]:
        crops = [self._transform(Image.fromarray(cut_out(image.image, one))) for one in detections]
        with self._torch.no_grad():
            features = self._clip.encode_image(self._torch.stack(crops).to(self._device))
            features = features / features.norm(dim=-1, keepdim=True)
            best = (features @ self._features_of_colours(class_name).T).argmax(dim=-1)
        return [COLOURS[int(index)] for index in best]

    def _features_of_colours(self, name: str):
        """[colours, d]: the mean over each colour's sentences, normalised."""
        if name not in self._colour_features:
            rows = []
            for colour in COLOURS:
                tokens = self._tokenize([sentence.format(colour=colour, name=name) for sentence in SENTENCES])
                features = self._clip.encode_text(tokens.to(self._device))
                mean = (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)
                rows.append(mean / mean.norm())
            self._colour_features[name] = self._torch.stack(rows)
        return self._colour_features[name]


def _imports():
    try:
        import mmdet.apis
        import open_clip
        import torch
    except ImportError as error:
        raise UserError(f'the detector of GenEval needs {error.name}, which is not installed: install the '
                        'extra geneval of pyproject.toml, or give a file of stored detections') from error
    return torch, mmdet.apis, open_clip
