"""The rules: which objects count, and whether they fit a prompt. Source: djghosh13/geneval@af4902f.

- Objects count with a confidence above 0.3, in task `counting` above 0.9; per class the 16 most confident.
- Of an included class the `count` most confident are used. More do no harm, fewer fail.
- Colour: as many of these as `count` must have it.
- Position: each of these must have the relation to each object of the included entry it refers to.
- An excluded class fails from `count` objects on, which makes counting exact."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_jax.metrics.geneval.detector import Detection, Detector, Pixels
from lit_jax.metrics.geneval.geneval_prompts import TASKS

CONFIDENCE = 0.3
COUNTING_CONFIDENCE = 0.9
MOST_OBJECTS = 16         # per class
MARGIN = 0.1              # of the sum of the two sizes: closer centres are neither left nor right
DIRECTION = 0.5           # least share of the offset along an axis: at 30 degrees both relations hold
NEGLIGIBLE = 1e-3         # pixels


class Verdict(NamedTuple):
    """reasons: one sentence for each failure."""
    correct: bool
    reasons: tuple[str, ...] = ()


def judge(image: Pixels, prompt: dict, detector: Detector) -> Verdict:
    """Whether an image fits its prompt (see `geneval_prompts`)."""
    objects = keep_confident(detector.detect(image), prompt['tag'])
    reasons, matched = [], []
    for wanted in prompt.get('include', ()):
        found = objects.get(wanted['class'], [])[:wanted['count']]
        reason = (_missing(found, wanted) or _miscoloured(image, found, wanted, detector)
                  or _misplaced(found, wanted, matched))
        matched.append(None if reason else found)
        reasons += [reason] if reason else []
    for unwanted in prompt.get('exclude', ()):
        number = len(objects.get(unwanted['class'], []))
        if number >= unwanted['count']:
            reasons.append(f'expected fewer than {unwanted["count"]} {unwanted["class"]}, found {number}')
    return Verdict(not reasons, tuple(reasons))


def keep_confident(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """{class: its objects that count, the most confident first, of equal ones the later first}."""
    least = COUNTING_CONFIDENCE if task == 'counting' else CONFIDENCE
    objects = {}
    for found in sorted(reversed(detections), key=lambda found: -found.confidence):
        if found.confidence > least:
            objects.setdefault(found.class_name, []).append(found)
    return {name: kept[:MOST_OBJECTS] for name, kept in objects.items()}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The relations of one box to another: none, one or two of `geneval_prompts.RELATIONS`."""
    boxes = np.array([box, other], np.float64).reshape(2, 2, 2)         # box, corner, axis
    offset = boxes[0].mean(axis=0) - boxes[1].mean(axis=0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * sizes, 0)
    if (np.abs(beyond) < NEGLIGIBLE).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {'left of': x < -DIRECTION, 'right of': x > DIRECTION, 'above': y < -DIRECTION,
             'below': y > DIRECTION}
    return {name for name, true in holds.items() if true}


def summarise(results: Sequence[dict]) -> dict:
    """Scores of images, each a dict with `task`, `prompt` (any key that identifies it) and `correct`.

    Returns `overall`: mean over tasks, each with equal weight; `tasks`: mean per task; `correct_pictures`:
    mean over all images; `correct_prompts`: prompts with a correct image; `pictures`, `prompts`: counts."""
    order = {task: number for number, task in enumerate(TASKS)}
    names = sorted({result['task'] for result in results},
                   key=lambda task: (order.get(task, len(order)), task))
    tasks = {task: float(np.mean([r['correct'] for r in results if r['task'] == task])) for task in names}
    by_prompt = {}
    for result in results:
        by_prompt[result['prompt']] = by_prompt.get(result['prompt'], False) or result['correct']
    return {'overall': float(np.mean(list(tasks.values()))), 'tasks': tasks,
            'correct_pictures': float(np.mean([result['correct'] for result in results])),
            'correct_prompts': float(np.mean(list(by_prompt.values()))),
            'pictures': len(results), 'prompts': len(by_prompt)}


def _missing(found: list[Detection], wanted: dict) -> str:
    if len(found) >= wanted['count']:
        return ''
    return f'expected {wanted["count"]} {wanted["class"]}, found {len(found)}'


def _miscoloured(image: Pixels, found: list[Detection], wanted: dict, detector: Detector) -> str:
    if 'color' not in wanted:
        return ''
    colours = list(detector.colours(image, found, wanted['class']))
    if colours.count(wanted['color']) >= wanted['count']:
        return ''
    return f'expected {wanted["count"]} {wanted["color"]} {wanted["class"]}, found {", ".join(colours)}'


def _misplaced(found: list[Detection], wanted: dict, matched: list[list[Detection] | None]) -> str:
    if 'position' not in wanted:
        return ''
    relation, number = wanted['position']
    if matched[number] is None:
        return f'nothing for {wanted["class"]} to be {relation}'
    for one in found:
        for other in matched[number]:
            holding = relations(one.box, other.box)
            if relation not in holding:
                return (f'expected {wanted["class"]} {relation} its target, found '
                        f'{" and ".join(sorted(holding)) or "neither"}')
    return ''
