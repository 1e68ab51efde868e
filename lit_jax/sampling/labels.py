"""Which class each image shows, and the names of classes."""
import logging
from collections.abc import Sequence

import numpy as np

from lit_jax.runtime.errors import UserError, check_known, did_you_mean, shown, shown_name
from lit_jax.sampling.noise import MAX_IMAGES, random_labels

LOG = logging.getLogger('lit_jax')
POLICIES = ('random', 'balanced')
_SOME = 5      # names in a message


def class_names(config: dict, labels) -> list[str]:
    """The model's names of these classes; 'class 207' where it knows none."""
    names = config.get('classes')
    return [names[label] if names and names[label] else f'class {label}' for label in labels]


def shared_names(pipelines: Sequence, labels) -> list[str]:
    """The name of each class from the first of these models that knows one."""
    known = [class_names(one.config, labels) for one in pipelines]
    return [next((name for name in names if name != f'class {label}'), names[0])
            for label, *names in zip(labels, *known, strict=True)]


def parse_classes(text: str, names: Sequence[str], most: int | None = 10,
                  where: str = 'this model') -> list[int]:
    """Numbers of the classes in a text, names or numbers with commas between: '3,7' or 'cats,dogs' -> [3, 7];
    '' -> the first `most` classes (None: all). names: of all classes. A name may have commas of its own."""
    if not text:
        return list(range(len(names) if most is None else min(most, len(names))))
    parts, asked = [part.strip() for part in text.split(',')], []
    longest, known = 1 + max((name.count(',') for name in names), default=0), _numbers(names)
    while parts:      # the longest of the names that begin here
        words = next((words for words in range(min(longest, len(parts)), 1, -1)
                      if _key(','.join(parts[:words])) in known), 1)
        asked.append(','.join(parts[:words]))
        del parts[:words]
    return find_classes(asked, names, where)


def find_classes(asked: Sequence[str | int], names: Sequence[str], where: str = 'this model') -> list[int]:
    """Numbers of classes, given by names or numbers. Case does not matter; a number is one, counted from 0,
    also where classes are named by numbers. UserError for a class that is none of these."""
    known, found = _numbers(names), []
    for one in asked:
        try:
            number = int(one)
        except ValueError:
            if (number := known.get(_key(one), -1)) < 0:
                raise UserError(_unknown(str(one), names, where)) from None
        else:
            if not 0 <= number < len(names):
                raise UserError(f'class {number} is out of range; {where} knows 0..{len(names) - 1}')
            if known.get(str(number), number) != number and number not in found:
                LOG.warning('class %d, counted from 0, is %s; that of the name %d has the number %d', number,
                            shown(names[number]), number, known[str(number)])
        found.append(number)
    return found


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """{name, in one spelling: its number}, of several equal names the first."""
    return {_key(name): number for number, name in reversed(list(enumerate(names)))}


def _key(name) -> str:
    return ','.join(part.strip() for part in str(name).lower().replace('_', ' ').split(','))


def _unknown(name: str, names: Sequence[str], where: str) -> str:
    last = len(names) - 1
    if all(one == f'class {number}' for number, one in enumerate(names)):
        return f'unknown class {shown(name)}; {where} knows its classes by numbers only: 0..{last}'
    more = ', ...' if last >= _SOME else ''
    return (f'unknown class {shown(name)}{did_you_mean(name, names)}; {where} knows 0..{last}: '
            f'{", ".join(map(shown_name, names[:_SOME]))}{more}')


def spread_labels(count: int, num_classes: int) -> list[int]:
    """The class of each of `count` samples that a run draws: evenly spread."""
    return [i * num_classes // count for i in range(count)]


def choose_labels(policy: str, classes: Sequence[int], *, seed: int, count: int | None = None,
                  per_class: int | None = None) -> np.ndarray:
    """int32 [N], the label of every image, for a set of `count` images or of `per_class` images a class.
    random: each label drawn from (seed, number of the image), as for the published figures of DiT and LiT.
    balanced: the same number of each class, in turns, so that any stretch of the set holds all classes."""
    check_known('label policy', policy, POLICIES)
    if (count is None) == (per_class is None):
        raise UserError('say how many images with one of --count (all together) and --per_class (of each '
                        f'class), got {"neither" if count is None else "both"}')
    if policy == 'random' and count is None:
        raise UserError('--per_class means the same number of each class; random labels take --count, the '
                        'number of all images (or leave --labels out)')
    name, value, total = ('--count', count, count) if per_class is None else \
        ('--per_class', per_class, per_class * len(classes))
    if value < 1 or total > MAX_IMAGES:
        raise UserError(f'{name} must be at least 1, and all images at most {MAX_IMAGES:,}; got {value}')
    if policy == 'random':
        return random_labels(seed, total, classes)
    if total % len(classes):
        nearest = max(1, round(total / len(classes))) * len(classes)
        raise UserError(f'--count {total} is not a multiple of the {len(classes)} classes, so balanced '
                        f'labels are not possible; take --count {nearest}, or --labels random')
    return np.resize(np.asarray(classes, np.int32), total)
