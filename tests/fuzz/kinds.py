"""The kinds of files that are damaged: how valid ones are made and read, and when other values are a fault.

guard, for a case whose reader ends well but with other values than those of the valid files:
    whole   a fault: the files carry checksums over everything, or what is lost is made again
    bytes   a fault if bytes were hit (the format has checksums); a well-formed file may say something else
    free    no fault: nothing in the files could tell"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fuzz.mutations import Done, damage


class Kind(NamedTuple):
    """make(folder) writes valid files and returns what is damaged, a file or folder below it. read(input,
    folder) reads a damaged copy, beside the untouched rest. also(input, folder): other right values, such as
    of older checkpoints. weight: cases beside those of other kinds. runs: the file is a program of the
    user's own. named: a message names the damaged file (else the field). mutate(input, rng) -> Done."""
    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path, Path], object]
    guard: str = 'free'
    weight: int = 4
    also: Callable[[Path, Path], list] = lambda path, folder: []
    runs: bool = False
    named: bool = True
    mutate: Callable[..., Done] = damage


def all_kinds() -> dict[str, Kind]:
    """Name -> kind; imported here, in a worker, as some of them need jax and PyTorch."""
    from fuzz import kinds_data, kinds_pages, kinds_sets, kinds_weights
    kinds = (*kinds_weights.KINDS, *kinds_data.KINDS, *kinds_sets.KINDS, *kinds_pages.KINDS)
    return {kind.name: kind for kind in kinds}
