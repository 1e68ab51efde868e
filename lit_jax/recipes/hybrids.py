"""Short forms of `model.stages`, for models that keep another mixer in some of their blocks.

    every:4       every fourth block: 3, 7, 11, ...
    first:2       the first two; last:2 the last two
    0, 7, 14      these blocks, numbered from 0

Several together are joined: ('first:1', 'last:1'). What the blocks keep is the mixer of the teacher, or DiT's
softmax attention in a recipe without one."""
import itertools
import re
from collections.abc import Mapping, Sequence

from lit_jax.runtime.errors import UserError, shown

_FORM = re.compile(r'(every|first|last):([0-9]{1,6})')


def is_short(stages) -> bool:
    """Whether `model.stages` holds short forms, and not runs of blocks."""
    entries = stages if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    return any(isinstance(entry, str | int) for entry in entries)


def check_stages_text(text: str) -> None:
    """UserError for a lone number on a command line: a block, so many blocks, or so many stages?"""
    if text.strip().isdigit():
        number = text.strip()
        raise UserError(f'model.stages={number}: say what it counts: last:{number}, first:{number} or '
                        f'every:{number} (every so many blocks) for blocks that keep the attention of the '
                        f'teacher; with a comma, "{number},", block {number} alone, counted from 0')


def kept_blocks(stages, depth: int) -> list[int]:
    """The blocks that short forms name, in order. UserError for others, and for blocks that are not there."""
    entries = stages if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    kept: set[int] = set()
    for entry in entries:
        if isinstance(entry, int) and not isinstance(entry, bool):
            kept.add(entry)
        elif isinstance(entry, str) and (form := _FORM.fullmatch(entry)) and int(form[2]):
            kept |= {*_named(form[1], int(form[2]), depth)}
        else:
            raise UserError(f'model.stages: {shown(entry)} is no short form; give every:N, first:N, last:N, '
                            f'the numbers of blocks such as 0,7,14, or runs such as ({{"depth": 2}}, ...)')
    if outside := sorted(block for block in kept if not 0 <= block < depth):
        raise UserError(f'model.stages {shown(stages)}: there is no block {", ".join(map(str, outside))}; a '
                        f'model of {depth} blocks has 0 to {depth - 1}')
    return sorted(kept)


def _named(form: str, number: int, depth: int) -> range:
    if form == 'every':
        if number > depth:
            raise UserError(f'model.stages every:{number} keeps nothing in a model of {depth} blocks; give a '
                            f'number from 1 to {depth}')
        return range(number - 1, depth, number)
    return range(number) if form == 'first' else range(depth - number, depth)


def expand_stages(stages, depth: int, kept: Mapping) -> tuple[dict, ...]:
    """The runs of blocks that short forms stand for; `kept`: the mixer of the named blocks."""
    named = {*kept_blocks(stages, depth)}
    runs = [(inside, len(list(group))) for inside, group in
            itertools.groupby(range(depth), key=lambda block: block in named)]
    return tuple({'depth': blocks, 'mixer': dict(kept)} if inside else {'depth': blocks}
                 for inside, blocks in runs)
