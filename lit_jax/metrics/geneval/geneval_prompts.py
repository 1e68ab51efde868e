"""The 553 prompts of GenEval, made by its rule: random draws with one seed, without duplicates.

A prompt is a dict: `tag` (its task), `include` (required objects: class, count, and color or position),
`exclude` (class and the count that is too many), `prompt`. A position is [relation, index of the object it
refers to]. Names, order of draws and of keys are those of the published files (djghosh13/geneval)."""
import json
from functools import cache

import numpy as np

from lit_jax.runtime.paths import explain_unwritable, prepare_folder, write_text_atomic

SEED = 43
DRAWS = 100           # per task, before duplicates are dropped
TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white')
RELATIONS = ('left of', 'right of', 'above', 'below')
NUMBERS = {2: 'two', 3: 'three', 4: 'four'}
# The classes of COCO in their order; mouse, remote and keyboard got a qualifier.
CLASSES = tuple((
    'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,'
    'stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,'
    'backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,'
    'baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,'
    'knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,'
    'chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,'
    'computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,'
    'scissors,teddy bear,hair drier,toothbrush'
).split(','))
PROMPTS_FILE, METADATA_FILE = 'generation_prompts.txt', 'evaluation_metadata.jsonl'


@cache
def make_prompts() -> tuple[dict, ...]:
    """The prompts in file order. Shared by all callers: do not change them."""
    rng = np.random.default_rng(SEED)
    singles = [_single(name) for name in _names(rng, len(CLASSES))]
    drawn = singles + [make(rng) for make in (_two, _counting, _colour, _position, _colours)
                       for _ in range(DRAWS)]
    return tuple({json.dumps(prompt): prompt for prompt in drawn}.values())


def metadata_text() -> str:
    """One JSON object per line."""
    return ''.join(json.dumps(prompt) + '\n' for prompt in make_prompts())


def prompts_text() -> str:
    """One prompt per line."""
    return ''.join(prompt['prompt'] + '\n' for prompt in make_prompts())


def write_prompts(out) -> int:
    """Writes the prompts and makes the folders for images; returns the number of prompts.

    OUT/generation_prompts.txt, OUT/evaluation_metadata.jsonl, and for each prompt OUT/00000/metadata.jsonl;
    its images belong in OUT/00000/samples/0000.png and so on, four per prompt for published numbers."""
    out = prepare_folder(out)
    write_text_atomic(out / PROMPTS_FILE, prompts_text())
    write_text_atomic(out / METADATA_FILE, metadata_text())
    for number, prompt in enumerate(make_prompts()):
        folder = out / f'{number:05d}'
        with explain_unwritable(folder):
            (folder / 'samples').mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / 'metadata.jsonl', json.dumps(prompt) + '\n')
    return len(make_prompts())


def with_article(words: str) -> str:
    """'an apple', 'a red apple': by the first letter, not by the sound."""
    return f'{"an" if words[0] in "aeiou" else "a"} {words}'


def plural(name: str) -> str:
    """'buses', and also 'sheeps' and 'knifes', as published."""
    return name + ('es' if name.endswith('s') else 's')


def _names(rng, count: int, skip_person: bool = False) -> list[str]:
    """Different classes; a person has no colour."""
    first = int(skip_person)
    return [CLASSES[first + i] for i in rng.choice(len(CLASSES) - first, size=count, replace=False)]


def _one_of(rng, words: tuple[str, ...]) -> str:
    return words[rng.choice(len(words))]


def _object(name: str, count: int = 1, **rest) -> dict:
    return {'class': name, 'count': count, **rest}


def _prompt(task: str, include: list[dict], text: str, **exclude) -> dict:
    return {'tag': task, 'include': include, **exclude, 'prompt': f'a photo of {text}'}


def _single(name: str) -> dict:
    return _prompt('single_object', [_object(name)], with_article(name))


def _two(rng) -> dict:
    a, b = _names(rng, 2)
    return _prompt('two_object', [_object(a), _object(b)], f'{with_article(a)} and {with_article(b)}')


def _counting(rng) -> dict:
    name = _one_of(rng, CLASSES)
    count = int(rng.integers(2, 4, endpoint=True))
    return _prompt('counting', [_object(name, count)], f'{NUMBERS[count]} {plural(name)}',
                   exclude=[_object(name, count + 1)])


def _colour(rng) -> dict:
    name, colour = _one_of(rng, CLASSES[1:]), _one_of(rng, COLOURS)
    return _prompt('colors', [_object(name, color=colour)], with_article(f'{colour} {name}'))


def _position(rng) -> dict:
    """The second object is first in the list, as the other one refers to it."""
    a, b = _names(rng, 2)
    relation = _one_of(rng, RELATIONS)
    return _prompt('position', [_object(b), _object(a, position=[relation, 0])],
                   f'{with_article(a)} {relation} {with_article(b)}')


def _colours(rng) -> dict:
    a, b = _names(rng, 2, skip_person=True)
    first, second = (COLOURS[i] for i in rng.choice(len(COLOURS), size=2, replace=False))
    return _prompt('color_attr', [_object(a, color=first), _object(b, color=second)],
                   f'{with_article(f"{first} {a}")} and {with_article(f"{second} {b}")}')
