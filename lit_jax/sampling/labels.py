"""Which class each image shows."""
from collections.abc import Sequence

import numpy as np

from lit_jax.runtime.errors import UserError, check_known, shown
from lit_jax.sampling.noise import MAX_IMAGES, random_labels

POLICIES = ('random', 'balanced')


def parse_classes(text: str, num_classes: int, most: int | None = 10) -> list[int]:
    """'3,7' -> [3, 7], checked against the model; '' -> the first `most` classes (None: all)."""
    if not text:
        return list(range(num_classes if most is None else min(most, num_classes)))
    try:
        classes = [int(part) for part in text.split(',')]
    except ValueError:
        raise UserError(f'--classes {shown(text)} is not a list of class indices such as 3,7') from None
    if wrong := [c for c in classes if not 0 <= c < num_classes]:
        raise UserError(f'class {", ".join(map(str, wrong))} is out of range; this model knows '
                        f'0..{num_classes - 1}')
    return classes


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
