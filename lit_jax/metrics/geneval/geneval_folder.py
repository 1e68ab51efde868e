"""Scores a folder of images, OUT/00000/samples/0000.png beside OUT/00000/metadata.jsonl, as laid out by
`write_prompts` and by GenEval's own scripts."""
import io
import json
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps

from lit_jax.metrics.geneval.detector import Detector, Pixels, detection_line
from lit_jax.metrics.geneval.geneval_prompts import TASKS, make_prompts, write_prompts
from lit_jax.metrics.geneval.rules import judge, keep_confident, summarise
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.image_errors import DECODE_ERRORS
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import as_path, write_text_atomic

__all__ = ['score_folder', 'store_detections', 'write_prompts']

_OBJECT = {'class': str, 'count': int}
_PROMPT = {'tag': str, 'prompt': str, 'include': [{**_OBJECT, 'color?': str, 'position?': [object]}],
           'exclude?': [_OBJECT]}
IMAGES = 4          # per prompt in published numbers


def score_folder(folder, detector: Detector, progress: Callable[[int, int], None] | None = None) -> dict:
    """`rules.summarise` of the images, with `notes` (why this is no published GenEval number, if so) and
    `results`: name, task, prompt, correctness and reasons of each image.

    progress: called with (prompts done, prompts in all).
    UserError if the folder has another layout, or an image cannot be read."""
    prompts = read_prompts(folder)
    results, counts = [], []
    for done, (number, prompt) in enumerate(prompts.items(), 1):
        before = len(results)
        for image in read_images(folder, number):
            verdict = judge(image, prompt, detector)
            results.append({'image': image.name, 'task': prompt['tag'], 'prompt': prompt['prompt'],
                            'correct': verdict.correct, 'reasons': list(verdict.reasons)})
        counts.append(len(results) - before)
        if progress:
            progress(done, len(prompts))
    if not results:
        raise UserError(f'{folder} has {len(prompts)} prompts and no image; put images into '
                        f'{next(iter(prompts))}/samples/0000.png and so on')
    return summarise(results) | {'notes': _notes(prompts, counts, results), 'results': results}


def store_detections(folder, detector: Detector, out) -> int:
    """Writes the detections in a folder for `StoredDetections`; returns the number of images.

    So the network can run once on one machine, and scores be computed elsewhere. Colours are found for
    classes of which the prompt asks for the colour."""
    lines = []
    for number, prompt in read_prompts(folder).items():
        coloured = {wanted['class'] for wanted in prompt['include'] if 'color' in wanted}
        for image in read_images(folder, number):
            found = detector.detect(image)
            objects = keep_confident(found, prompt['tag'])
            for name in coloured & set(objects):
                colours = detector.colours(image, objects[name], name)
                objects[name] = [one._replace(colour=colour)
                                 for one, colour in zip(objects[name], colours, strict=True)]
            # Lowest confidence first: of equal ones, the later one is used first.
            lines.append(detection_line(image.name,
                                        [one for kept in objects.values() for one in reversed(kept)]))
    write_text_atomic(as_path(out), ''.join(lines))
    return len(lines)


def read_prompts(folder) -> dict[str, dict]:
    """{name of each numbered folder: its prompt}."""
    root = as_path(folder)
    if not root.is_dir():
        raise UserError(f'{folder} is not a folder; make the prompts first, draw their images, and give that '
                        'folder')
    names = sorted((path.name for path in root.iterdir() if path.name.isdigit() and path.is_dir()), key=int)
    if not names:
        raise UserError(f'{folder} has no folders 00000, 00001, ...; make the prompts first')
    return {name: _read_prompt(root / name / 'metadata.jsonl') for name in names}


def read_images(folder, number: str) -> Iterator[Pixels]:
    """The images NNNN.png of one prompt, by number."""
    samples = as_path(folder) / number / 'samples'
    names = [path.name for path in samples.iterdir()] if samples.is_dir() else []
    for name in sorted((name for name in names if name.endswith('.png') and name[:-4].isdigit()),
                       key=lambda n: int(n[:-4])):
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO((samples / name).read_bytes())))
            yield Pixels(f'{number}/samples/{name}', np.asarray(image.convert('RGB')))
        except DECODE_ERRORS as error:
            raise UserError(f'{samples / name} is not a readable image ({reason_of(error)}); draw it '
                            f'again') from error


def _read_prompt(path) -> dict:
    try:
        prompt = read_json(path, _PROMPT)
        for position, wanted in enumerate(prompt['include']):
            if 'position' in wanted and not 0 <= wanted['position'][1] < position:
                raise ValueError('a position that refers to no earlier object')
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f'{path} is not the description of a prompt ({reason_of(error)}); '
                        'expected a JSON object with tag, include and prompt; make it again') from error
    return prompt


def _notes(prompts: dict[str, dict], counts: list[int], results: list[dict]) -> list[str]:
    notes, listed = [], make_prompts()
    if len(prompts) != len(listed):
        notes.append(f'{len(prompts)} prompts, GenEval has {len(listed)}')
    known = [json.dumps(prompt) for prompt in listed]
    others = sum(json.dumps(prompt) not in known for prompt in prompts.values())
    if others:
        notes.append(f'{others} prompts are not those of GenEval')
    if set(counts) != {IMAGES}:
        notes.append(f'{min(counts)} to {max(counts)} images of a prompt, published numbers have {IMAGES}')
    missing = [task for task in TASKS if task not in {result['task'] for result in results}]
    if missing:
        notes.append(f'no images of the tasks {", ".join(missing)}: overall is the mean of the others')
    return notes
